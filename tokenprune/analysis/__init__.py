"""Analysis: what a sparsified model costs, how fast it is, what it keeps, and whether it holds the invariants."""
