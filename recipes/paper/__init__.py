"""The papers' main table: its rows, and the weights for them."""
