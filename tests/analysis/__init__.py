"""Tests of counting, measuring, pictures and reports."""
