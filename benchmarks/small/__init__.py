"""How the small suite's data and models were made."""
