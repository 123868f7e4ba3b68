"""Tests of finding the blocks and tokens of models."""
