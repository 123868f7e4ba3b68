"""tokenprune makes a Vision Transformer faster by letting it drop the tokens it does not need."""

from tokenprune import functional
from tokenprune.backbone import Backbone, Setting
from tokenprune.errors import (
    CountingError,
    InterceptionError,
    PlanError,
    StateError,
    TokenpruneError,
    UnsupportedModelError,
)
from tokenprune.plan import Plan
from tokenprune.scorers import Candidates, Scorer, ScorerContext, register_scorer
from tokenprune.sparsifier import Sparsifier
from tokenprune.sparsify import dense, sparsify, unsparsify
from tokenprune.trace import Trace

__version__ = "0.1.0"
