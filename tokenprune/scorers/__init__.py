"""Scorers: what decides how much a token matters."""

from tokenprune.scorers.base import (
    Candidates,
    Scorer,
    ScorerBuilder,
    ScorerContext,
    register_scorer,
    scorer_builder,
    scorer_name,
)
from tokenprune.scorers.cls_attention import ClassAttention
from tokenprune.scorers.predictor import Predictor
from tokenprune.scorers.random import Random
from tokenprune.scorers.static import Static

__all__ = [
    "Candidates",
    "ClassAttention",
    "Predictor",
    "Random",
    "Scorer",
    "ScorerBuilder",
    "ScorerContext",
    "Static",
    "register_scorer",
    "scorer_builder",
    "scorer_name",
]
