"""Training: the objective, calibration without labels, gathered training."""
