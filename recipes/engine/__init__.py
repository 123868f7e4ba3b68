"""The training engine that every recipe runs on."""
