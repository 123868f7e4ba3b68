"""From a budget to a plan: what plans cost, how they are searched, how fast they are."""

from tokenprune.analysis.planning.planning import plan_for

__all__ = ["plan_for"]
