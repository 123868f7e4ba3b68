"""Tests of integrations with trainers."""
