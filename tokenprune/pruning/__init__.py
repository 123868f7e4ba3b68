"""Pruning: the stages of a model, the hooks that ask them, and how their decisions are carried out."""
