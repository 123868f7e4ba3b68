"""Scorers: what decides how much a token matters."""

from tokenprune.scorers.base import (
    Candidates,
    Scored,
    Scorer,
    ScorerBuilder,
    ScorerContext,
    register_scorer,
    scorer_builder,
    scorer_name,
)
from tokenprune.scorers.cls_attention import ClassAttention
from tokenprune.scorers.informative import Informative
from tokenprune.scorers.predictor import Predictor
from tokenprune.scorers.predictor_linear import PredictorLinear
from tokenprune.scorers.predictor_slim import PredictorSlim
from tokenprune.scorers.random import Random
from tokenprune.scorers.redundancy import Redundancy
from tokenprune.scorers.rows import Ranking, Rows
from tokenprune.scorers.static import Static
from tokenprune.scorers.tome import ToMe, tome_keep_ratios

__all__ = [
    "Candidates",
    "ClassAttention",
    "Informative",
    "Predictor",
    "PredictorLinear",
    "PredictorSlim",
    "Random",
    "Ranking",
    "Redundancy",
    "Rows",
    "Scored",
    "Scorer",
    "ScorerBuilder",
    "ScorerContext",
    "Static",
    "ToMe",
    "register_scorer",
    "scorer_builder",
    "scorer_name",
    "tome_keep_ratios",
]
