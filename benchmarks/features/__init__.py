"""One file an evaluator: the features that distances are computed on."""
