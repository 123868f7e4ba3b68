"""Tests of pruning itself, and of what users do with a pruned model."""
