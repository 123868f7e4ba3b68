"""The verbs: sparsify a model, run it dense, and give it back as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from tokenprune.backbones.adapters import describe
from tokenprune.backbones.backbone import Backbone
from tokenprune.errors import PlanError, StateError, UnsupportedModelError
from tokenprune.pruning.plan import Plan
from tokenprune.pruning.sparsifier import Pruned, Sparsifier
from tokenprune.scorers import Scorer, ScorerBuilder, ScorerContext, scorer_builder, scorer_name

Model = TypeVar("Model", bound=nn.Module)


def sparsify(
    model: Model,
    stages: Sequence[int] | None = None,
    keep_ratio: float | Sequence[float] = 0.7,
    *,
    scorer: str | ScorerBuilder = "predictor",
    pruned: Pruned = "drop",
    backbone: Backbone | None = None,
) -> Model:
    """Let a Vision Transformer drop the tokens it does not need.

    The model is changed in place: its forward pass, its state dict's keys and its class stay what
    they were, and everything new lives in ``model.tokenprune``. In training mode tokens are masked,
    so that the scorers learn; in eval mode they are removed, and the model is faster.

    DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification (arXiv 2106.02034).

    Args:
        model: A model that an installed adapter knows, or any other together with ``backbone``. To find
            its blocks an adapter may run it once, in eval mode, on two random images.
        stages: Indices of the blocks in front of which tokens are pruned, ascending; ``None`` means
            the multiples of depth // 4, such as 3, 6, 9 of 12 blocks.
        keep_ratio: A number ρ keeps ρ, ρ², ρ³ … of the original patch tokens; a sequence gives one
            such fraction a stage. In (0, 1].
        scorer: ``"predictor"`` (learned, DynamicViT's), ``"cls_attention"`` (nothing to learn: what a
            token receives in the block before the stage), ``"random"``, ``"static"``, or a callable
            that takes a `ScorerContext` and returns a new `Scorer`.
        pruned: What becomes of pruned tokens. ``"drop"``: they are gone for good. ``"preserve"``: later
            blocks run without them all the same, but behind every block they are put back at their
            places, as they were when they were pruned, so that feature maps, hidden states and dense
            heads get every token. Models that need that by themselves, such as those with a dense head of
            transformers, get it either way.
        backbone: What the model looks like, where no adapter says.

    Returns:
        ``model`` itself.

    Raises:
        PlanError: Stages or ratios make no plan for this model.
        UnsupportedModelError: The model cannot be sparsified, or not in this way; the message says why.
        StateError: It is sparsified already.
        ValueError, TypeError: The scorer or ``pruned`` is unknown.

    Whatever is raised, the model is left exactly as it was.
    """
    _check_model(model)
    if pruned not in ("drop", "preserve"):
        raise ValueError(f"pruned={pruned!r}: choose 'drop' or 'preserve'.")
    build_scorer = scorer_builder(scorer)
    backbone = describe(model) if backbone is None else backbone
    if not isinstance(backbone, Backbone):
        raise TypeError(f"backbone={type(backbone).__name__}: expected a tokenprune.Backbone that describes the model.")
    backbone.check(model)
    if pruned == "drop" and "forward" in backbone.grid_methods:
        raise UnsupportedModelError(
            f'{type(model).__name__} puts out feature maps, which need every token; pass pruned="preserve".'
        )
    plan = Plan.build(depth=len(backbone.blocks), stages=stages, keep_ratio=keep_ratio)
    scorers = [
        build_scorer(ScorerContext(backbone.embed_dim, probability, backbone.grid_size))
        for probability in plan.keep_probabilities
    ]
    for built in scorers:
        if not isinstance(built, Scorer):
            raise TypeError(f"scorer={scorer!r} built a {type(built).__name__}; expected a tokenprune.Scorer.")
    if any(built.needs_attention for built in scorers):
        _check_attention(plan, backbone, scorer)
    sparsifier = Sparsifier(plan, backbone, scorers, pruned=pruned, scorer_name=scorer_name(scorer))
    for index, stage in zip(plan.stages, sparsifier.stages, strict=True):
        parameter = next(backbone.blocks[index].parameters(), None)
        if parameter is not None:
            stage.to(device=parameter.device, dtype=parameter.dtype)
    sparsifier.train(model.training)
    sparsifier.attach(model)
    return model


def unsparsify(model: Model) -> Model:
    """Take out of ``model`` everything that `sparsify` put in.

    Returns:
        ``model`` itself, with the weights it has now.

    Raises:
        StateError: It is not sparsified.
    """
    sparsifier_of(model).detach(model)
    return model


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """While the context lasts, the model runs unpruned.

    Raises:
        StateError: The model is not sparsified.
    """
    with sparsifier_of(model).disabled():
        yield


def sparsifier_of(model: nn.Module) -> Sparsifier:
    """The sparsifier of a model, also through wrappers such as DDP and `torch.compile`.

    Raises:
        StateError: The model is not sparsified.
    """
    inner = unwrap(model)
    sparsifier = getattr(inner, "tokenprune", None)
    if not isinstance(sparsifier, Sparsifier):
        raise StateError(f"this {type(inner).__name__} is not sparsified; call tokenprune.sparsify(model) first.")
    return sparsifier


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers that hold it as ``module`` (DDP) or ``_orig_mod`` (`torch.compile`)."""
    for name in ("_orig_mod", "module"):
        inner = model._modules.get(name)
        if inner is not None and not isinstance(model._modules.get("tokenprune"), Sparsifier):
            return unwrap(inner)
    return model


def _check_attention(plan: Plan, backbone: Backbone, scorer: str | ScorerBuilder) -> None:
    if plan.stages[0] == 0:
        raise PlanError(
            f"stages={plan.stages}: scorer={scorer!r} goes by the attention of the block before a stage, and there is "
            "none before block 0; move the stage, or take another scorer."
        )
    if backbone.weight_mixers:
        mixer = type(backbone.weight_mixers[0]).__name__
        raise UnsupportedModelError(
            f"scorer={scorer!r} goes by attention, whose weights this model mixes over the heads afterwards (by a "
            f"{mixer}), so what a token receives cannot be told; take another scorer."
        )


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(f"{type(model).__name__} is TorchScript; sparsify the Python model it came from.")
    for name, module in model.named_modules():
        if isinstance(module, Sparsifier):
            where = f"its {name.removesuffix('.tokenprune')}" if name != "tokenprune" else "it"
            raise StateError(
                f"this {type(model).__name__} is sparsified already ({where} carries tokenprune); set "
                "model.tokenprune.keep_ratio for another ratio, or call tokenprune.unsparsify first."
            )
    if hasattr(model, "tokenprune"):
        raise StateError(f"this {type(model).__name__} has an attribute 'tokenprune' of its own; it is in the way.")
