"""Tests of saving, loading and exporting."""
