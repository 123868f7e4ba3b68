"""What `tokenprune.sparsify` refuses before it changes anything.

All functions raise `UnsupportedModelError`, `PlanError` or `StateError`, with a message that says why and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tokenprune.backbones.backbone import Backbone
from tokenprune.backbones.vision_language import VisionLanguage
from tokenprune.errors import PlanError, StateError, UnsupportedModelError
from tokenprune.pruning.language import LanguagePruning, Pruner
from tokenprune.pruning.plan import Plan
from tokenprune.pruning.reductions import Reduction, ReductionBuilder
from tokenprune.pruning.sparsifier import Sparsifier
from tokenprune.pruning.stage import Stage
from tokenprune.scorers import ScorerBuilder


def check_hierarchy(
    model: nn.Module, backbone: Backbone, reductions: Sequence[Reduction], pruned: str | ReductionBuilder
) -> None:
    """Refuse reductions that take tokens out of a hierarchy."""
    if backbone.hierarchy is not None and not all(reduction.whole for reduction in reductions):
        kinds = ", ".join(sorted({type(block).__name__ for block in backbone.blocks}))
        why = f"the blocks of {type(model).__name__} ({kinds}) need the full grid of tokens."
        raise UnsupportedModelError(
            f"{backbone.hierarchy.obstacle or why} So pruned={pruned!r}, which takes tokens out of the sequence, is "
            "not for this model; pass pruned='fast', with which they stay and skip the expensive part of each block."
        )


def check_scorers(plan: Plan, backbone: Backbone, stages: Sequence[Stage], scorer: str | ScorerBuilder) -> None:
    """Refuse scorers that would not get what they need of the model's blocks."""
    scorers = [stage.scorer for stage in stages]
    if any(one.inside_block for one in scorers):
        _check_inside(plan, backbone, stages, scorer)
    if not any(one.needs_recording for one in scorers):
        return
    if backbone.hierarchy is not None:
        raise UnsupportedModelError(
            f"scorer={scorer!r} needs attention scores over all tokens, and the blocks of a hierarchy attend within "
            "windows or not at all; take another scorer, such as 'predictor'."
        )
    if plan.stages[0] == 0 and not scorers[0].inside_block:
        raise PlanError(
            f"stages={plan.stages}: scorer={scorer!r} needs attention scores of the block before a stage, and there is "
            "none before block 0; move the stage, or take another scorer."
        )
    mixer = next((one for one in backbone.adaptations if one.mixes_weights), None)
    if mixer is not None and any(one.needs_attention for one in scorers):
        modules = ", ".join(sorted({type(module).__name__ for module in mixer.modules()}))
        raise UnsupportedModelError(
            f"scorer={scorer!r} needs attention scores, but this model mixes the weights over the heads after the "
            f"softmax (by {modules}), so what a token receives is unknown; take another scorer."
        )


def _check_inside(plan: Plan, backbone: Backbone, stages: Sequence[Stage], scorer: str | ScorerBuilder) -> None:
    """Refuse stages inside of blocks where tokens cannot be merged there."""
    if not all(stage.scorer.inside_block for stage in stages):
        raise PlanError(f"scorer={scorer!r}: stages stand inside of their blocks or in front of them, all alike.")
    if backbone.packed is not None:
        raise UnsupportedModelError(
            f"scorer={scorer!r} merges one number of tokens of every image, and this model is given images of "
            "different sizes; take another scorer, such as 'predictor'."
        )
    if any(stage.reduction.whole for stage in stages):
        raise PlanError(
            f"scorer={scorer!r} has its stages inside of blocks, and this reduction leaves all tokens in them; take "
            "another scorer, or a reduction such as 'merge_sizes'."
        )
    for index in plan.stages:
        attentions = backbone.attention_modules(index)
        if len(attentions) != 1 or attentions[0] is backbone.blocks[index]:
            raise UnsupportedModelError(
                f"scorer={scorer!r} merges tokens between a block's attention and its MLP, and a block of this model "
                "has no attention module of its own, or several; take a scorer that prunes in front of blocks."
            )


def check_pruner(model: nn.Module, language: VisionLanguage | None, pruner: str | Pruner | None) -> None:
    """Refuse to hand on what a tower has kept where nobody knows what that is."""
    if language is not None and language.block is None and pruner in (None, "tower"):
        raise UnsupportedModelError(
            f"{type(model).__name__} makes image tokens of its patches in a way that leaves it unknown which of them "
            "the tower has kept; pass pruner=, such as pruner='diverse', to choose them behind the projector."
        )


def check_behind_tower(
    model: nn.Module, scorer: str | ScorerBuilder, pruned: str | ReductionBuilder, pruner: str | Pruner | None
) -> None:
    """Refuse what has no meaning without stages, and a model that prunes behind its tower already."""
    if scorer != "predictor" or pruned != "drop" or pruner == "tower":
        raise PlanError(
            f"stages=() leaves the vision tower as it is, so scorer={scorer!r}, pruned={pruned!r} and "
            f"pruner={pruner!r} would have nothing to decide; pass stages, or another pruner alone."
        )
    if hasattr(model, "tokenprune") or any(isinstance(module, LanguagePruning) for module in model.modules()):
        raise StateError(f"this {type(model).__name__} is sparsified already; call tokenprune.unsparsify first.")


def check_model(model: nn.Module) -> None:
    """Refuse what is no model, or carries something that is in the way."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(f"{type(model).__name__} is TorchScript; sparsify the Python model it came from.")
    for name, module in model.named_modules():
        if isinstance(module, (Sparsifier, LanguagePruning)):
            where = f"its {name.removesuffix('.tokenprune')}" if name != "tokenprune" else "it"
            raise StateError(
                f"this {type(model).__name__} is sparsified already ({where} carries tokenprune); set "
                "model.tokenprune.keep_ratio for another ratio, or call tokenprune.unsparsify first."
            )
    if hasattr(model, "tokenprune"):
        raise StateError(f"this {type(model).__name__} has an attribute 'tokenprune' of its own; it is in the way.")
