"""Accuracy at a cost: which scorer, reduction and training give what, on two data sets."""
