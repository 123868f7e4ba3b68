"""Optional modules that fit the library into a host's own training or serving classes.

None is imported by the library; each needs the host it is named after.
"""
