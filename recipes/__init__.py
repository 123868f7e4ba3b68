"""Training recipes on tokenprune's public API."""
