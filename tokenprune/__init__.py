"""tokenprune makes a Vision Transformer faster by letting it drop the tokens it does not need."""

import sys

from tokenprune import functional
from tokenprune.analysis import plotting
from tokenprune.analysis.benchmark import ThroughputReport, throughput
from tokenprune.analysis.flop_counter import FlopReport, flops
from tokenprune.analysis.kept_tokens import KeptTokens, kept_tokens
from tokenprune.analysis.overlays import animate, show
from tokenprune.analysis.planning import plan_for
from tokenprune.analysis.prefill import PrefillReport, PrefillTimes, prefill_flops, prefill_times
from tokenprune.analysis.proof import prove
from tokenprune.analysis.report import report
from tokenprune.analysis.verification import VerificationReport, verify
from tokenprune.api import dense, freeze, sparsify, unfreeze, unsparsify
from tokenprune.backbones import probing, structure
from tokenprune.backbones.adaptations import Adaptation, Setting, TokenTable
from tokenprune.backbones.adapters import Adapter
from tokenprune.backbones.backbone import Backbone
from tokenprune.backbones.examples import Example
from tokenprune.backbones.levels import Hierarchy, Level
from tokenprune.backbones.packed import Packed
from tokenprune.backbones.preprocessing import Preprocessing
from tokenprune.backbones.supported import SupportedModel, supported
from tokenprune.backbones.token_wise import TokenWise
from tokenprune.backbones.vision_language import VisionLanguage
from tokenprune.errors import (
    CheckpointError,
    CountingError,
    ExportError,
    HostError,
    InterceptionError,
    MissingExtraError,
    PictureError,
    PlanError,
    PromptError,
    ProofError,
    StateError,
    TokenpruneError,
    UnknownModelError,
    UnsupportedModelError,
)
from tokenprune.pruning.language import LanguagePruning, LanguageTrace, register_pruner
from tokenprune.pruning.plan import Plan
from tokenprune.pruning.reductions import Reduced, Reduction, ReductionContext, Split, register_reduction
from tokenprune.pruning.selection import Selection
from tokenprune.pruning.sparsifier import Sparsifier
from tokenprune.pruning.trace import Trace
from tokenprune.saving import from_pretrained, push_to_hub, save_pretrained
from tokenprune.saving.dynamicvit import load_dynamicvit
from tokenprune.saving.export import ExportReport, export
from tokenprune.scorers import Candidates, Scored, Scorer, ScorerContext, register_scorer, tome_keep_ratios
from tokenprune.training.budgets import BudgetReport, calibrate_budget
from tokenprune.training.calibration import calibrate
from tokenprune.training.calibration_report import CalibrationReport
from tokenprune.training.fast_paths import fit_fast_paths
from tokenprune.training.gathered import gathered
from tokenprune.training.losses import DynamicViTLoss

__version__ = "0.1.0"

# Where the documentation of 0.1 imports these from.
_MOVED = {"plotting": plotting, "probing": probing, "structure": structure}
sys.modules.update({f"{__name__}.{name}": module for name, module in _MOVED.items()})

__all__ = [
    "Adaptation",
    "Adapter",
    "Backbone",
    "BudgetReport",
    "CalibrationReport",
    "Candidates",
    "CheckpointError",
    "CountingError",
    "DynamicViTLoss",
    "Example",
    "ExportError",
    "ExportReport",
    "FlopReport",
    "Hierarchy",
    "HostError",
    "InterceptionError",
    "KeptTokens",
    "LanguagePruning",
    "LanguageTrace",
    "Level",
    "MissingExtraError",
    "Packed",
    "PictureError",
    "Plan",
    "PlanError",
    "PrefillReport",
    "PrefillTimes",
    "Preprocessing",
    "PromptError",
    "ProofError",
    "Reduced",
    "Reduction",
    "ReductionContext",
    "Scored",
    "Scorer",
    "ScorerContext",
    "Selection",
    "Setting",
    "Sparsifier",
    "Split",
    "StateError",
    "SupportedModel",
    "ThroughputReport",
    "TokenTable",
    "TokenWise",
    "TokenpruneError",
    "Trace",
    "UnknownModelError",
    "UnsupportedModelError",
    "VerificationReport",
    "VisionLanguage",
    "animate",
    "calibrate",
    "calibrate_budget",
    "dense",
    "export",
    "fit_fast_paths",
    "flops",
    "freeze",
    "from_pretrained",
    "functional",
    "gathered",
    "kept_tokens",
    "load_dynamicvit",
    "plan_for",
    "prefill_flops",
    "prefill_times",
    "prove",
    "push_to_hub",
    "register_pruner",
    "register_reduction",
    "register_scorer",
    "report",
    "save_pretrained",
    "show",
    "sparsify",
    "supported",
    "throughput",
    "tome_keep_ratios",
    "unfreeze",
    "unsparsify",
    "verify",
]
