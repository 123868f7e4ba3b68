"""Backbones: the description of somebody else's model, and how one is found or made."""
