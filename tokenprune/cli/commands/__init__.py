"""The commands, one a file: a module ``name`` with a function ``name`` is ``tokenprune name``."""
