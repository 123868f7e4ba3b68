"""The census: small models of every kind that a library can build, by library."""
