"""Executions: how decisions are carried out while a model runs."""
