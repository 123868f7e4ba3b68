"""Inputs of every kind by the thousand, valid and invalid, each of which works or ends in one clear error."""
