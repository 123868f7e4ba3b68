"""Tests of the engine that trains the recipes."""
