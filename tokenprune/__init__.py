"""tokenprune makes a Vision Transformer faster by letting it drop the tokens it does not need."""

from tokenprune import functional
from tokenprune.backbone import Backbone, Setting, TokenTable
from tokenprune.counting import FlopReport, flops
from tokenprune.discovery import SupportedModel, supported
from tokenprune.errors import (
    CheckpointError,
    CountingError,
    ExportError,
    InterceptionError,
    MissingExtraError,
    PictureError,
    PlanError,
    StateError,
    TokenpruneError,
    UnknownModelError,
    UnsupportedModelError,
)
from tokenprune.exporting import ExportReport, export
from tokenprune.inspection import KeptTokens, kept_tokens
from tokenprune.losses import DynamicViTLoss
from tokenprune.official import load_dynamicvit
from tokenprune.pictures import animate, show
from tokenprune.plan import Plan
from tokenprune.preprocessing import Preprocessing
from tokenprune.reporting import report
from tokenprune.saving import from_pretrained, push_to_hub, save_pretrained
from tokenprune.scorers import Candidates, Scorer, ScorerContext, register_scorer
from tokenprune.sparsifier import Sparsifier
from tokenprune.timing import ThroughputReport, throughput
from tokenprune.trace import Trace
from tokenprune.verbs import dense, sparsify, unsparsify
from tokenprune.verification import VerificationReport, verify

__version__ = "0.1.0"

__all__ = [
    "Backbone",
    "Candidates",
    "CheckpointError",
    "CountingError",
    "DynamicViTLoss",
    "ExportError",
    "ExportReport",
    "FlopReport",
    "InterceptionError",
    "KeptTokens",
    "MissingExtraError",
    "PictureError",
    "Plan",
    "PlanError",
    "Preprocessing",
    "Scorer",
    "ScorerContext",
    "Setting",
    "Sparsifier",
    "StateError",
    "SupportedModel",
    "ThroughputReport",
    "TokenTable",
    "TokenpruneError",
    "Trace",
    "UnknownModelError",
    "UnsupportedModelError",
    "VerificationReport",
    "animate",
    "dense",
    "export",
    "flops",
    "from_pretrained",
    "functional",
    "kept_tokens",
    "load_dynamicvit",
    "push_to_hub",
    "register_scorer",
    "report",
    "save_pretrained",
    "show",
    "sparsify",
    "supported",
    "throughput",
    "unsparsify",
    "verify",
]
