"""The papers' main table: its rows, and weights that stand for them."""
