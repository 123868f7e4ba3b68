"""Tests of tokenprune, on real models of real libraries."""
