"""One file a metric: a column of the tables."""
