"""What keeps the results true: making cells anew, comparing them with the committed ones, and how long that takes."""
