"""What users do with a model: sparsify it, run it dense, and get it back as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from tokenprune.backbones.adapters import describe, vision_language_of
from tokenprune.backbones.backbone import Backbone
from tokenprune.backbones.vision_language import VisionLanguage
from tokenprune.errors import PlanError, StateError, UnsupportedModelError
from tokenprune.pruning.language import LanguagePruning, Pruner
from tokenprune.pruning.parts import Parts, scored_shares
from tokenprune.pruning.plan import Plan
from tokenprune.pruning.reductions import (
    Reduction,
    ReductionBuilder,
    ReductionContext,
    reduction_builder,
    reduction_name,
)
from tokenprune.pruning.sparsifier import Sparsifier
from tokenprune.pruning.stage import Stage
from tokenprune.scorers import Scorer, ScorerBuilder, ScorerContext, scorer_builder, scorer_name

Model = TypeVar("Model", bound=nn.Module)
_ATTACHED = (Sparsifier, LanguagePruning)
Built = TypeVar("Built", bound=nn.Module)


def sparsify(
    model: Model,
    stages: Sequence[int] | None = None,
    keep_ratio: float | Sequence[float] = 0.7,
    *,
    scorer: str | ScorerBuilder = "predictor",
    pruned: str | ReductionBuilder = "drop",
    pruner: str | Pruner | None = None,
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
            the multiples of depth // 4, such as 3, 6, 9 of 12 blocks. Blocks of a hierarchy are counted through all its
            levels, and stages stand in one of them: with ``None`` in the one whose MLPs cost most, as a rule the third.
            Of a vision-language model ``()`` leaves the vision tower as it is.
        keep_ratio: A number ρ keeps ρ, ρ², ρ³ … of the original patch tokens; a sequence gives one
            such fraction a stage. In (0, 1]. The language model of a vision-language model is given the fraction of the
            last stage of each image's tokens, or, without stages, ρ.
        scorer: ``"predictor"`` (learned, DynamicViT's); with nothing to learn ``"cls_attention"`` (what a token
            receives in the block before the stage), ``"redundancy"`` (how much it differs from the others),
            ``"informative"`` (both) and ``"tome"`` (ToMe's matching, whose stages stand inside of their blocks,
            between attention and MLP); ``"random"``, ``"static"``, or a callable that takes a `ScorerContext` and
            returns a new `Scorer`.
        pruned: What becomes of pruned tokens. ``"drop"``: they are gone for good. ``"fuse"``: those of a stage go on
            as one token, their mean weighted with their importance (EViT's). ``"merge"``: each is folded into the
            most similar token that is kept (TPS'). ``"merge_sizes"``: the same by means weighted with the number of
            patches each stands for, to which later attention is in proportion (ToMe's). ``"preserve"``: later blocks
            run without them, but behind every block they are restored at their places, as they were when they were
            pruned, so that feature maps, hidden states and dense heads get every token; ``"fuse_preserve"``,
            ``"merge_preserve"`` and ``"merge_sizes_preserve"`` do both, and with the latter two a pruned token comes
            back in the state of the one that it was folded into. ``"fast"``: they stay in the sequence, and take a
            fast path around the MLP of each block, which is all that hierarchies such as Swin and ConvNeXt allow;
            every stage decides on all tokens anew, and with ``"fast_nested"`` on those that the stage before has
            kept. Models that need every token by themselves, such as those with a dense head of transformers, get
            them either way. Or a callable that takes a `ReductionContext` and returns a new `Reduction`.
        pruner: Of a vision-language model, which of an image's tokens the language model is given. ``"tower"``, the
            default with stages: those that the tower kept longest. By their embeddings behind the projector:
            ``"diverse"`` (DivPrune's, the default without stages), ``"informative"``, ``"random"``, or a callable
            ``pruner(embeddings, grid, k)`` that returns the positions of k of them, ascending, of (N, C) embeddings on
            a grid of (height, width) tokens or ``None``.
        backbone: What the model looks like, where no adapter says.

    Returns:
        ``model`` itself.

    Raises:
        PlanError: Stages or ratios make no plan for this model.
        UnsupportedModelError: The model cannot be sparsified, or not in this way; the message says why.
        StateError: It is sparsified already.
        ValueError, TypeError: The scorer, the reduction or the pruner is unknown.

    Whatever is raised, the model is left exactly as it was.
    """
    build_scorer, build_reduction = scorer_builder(scorer), reduction_builder(pruned)
    language = _language_of(model, pruner)
    if language is not None and stages is not None and len(stages) == 0:
        _check_behind_tower(model, scorer, pruned, pruner)
        behind = LanguagePruning(language, keep_ratio, pruner or "diverse")
        behind.train(model.training)
        behind.attach(model)
        return model
    _check_model(model)
    _check_pruner(model, language, pruner)
    backbone = describe(model) if backbone is None else backbone
    if not isinstance(backbone, Backbone):
        raise TypeError(f"backbone={type(backbone).__name__}: expected a tokenprune.Backbone that describes the model.")
    backbone.check(model)
    backbone = backbone.for_stages(stages)
    level = None if backbone.hierarchy is None else backbone.reach
    plan = Plan.build(depth=len(backbone.blocks), stages=stages, keep_ratio=keep_ratio, level=level)
    parts = Parts(model, backbone)
    reductions = []
    for number, probability in enumerate(plan.keep_probabilities):
        context = ReductionContext(backbone.embed_dim, probability, partial(parts.behind, plan, number))
        reductions.append(_built(Reduction, build_reduction, context, f"pruned={pruned!r}"))
    _check_hierarchy(model, backbone, reductions, pruned)
    for reduction in reductions:
        reduction.check(backbone, reduction_name(pruned) or type(reduction).__name__)
    backbone = parts.described
    built = []
    for reduction, probability in zip(reductions, scored_shares(plan, reductions), strict=True):
        scorer_context = ScorerContext(backbone.embed_dim, probability, backbone.grid_size)
        built.append(Stage(_built(Scorer, build_scorer, scorer_context, f"scorer={scorer!r}"), reduction))
    _check_scorers(plan, backbone, built, scorer)
    sparsifier = Sparsifier(
        plan,
        backbone,
        built,
        pruned=reduction_name(pruned),
        scorer=scorer_name(scorer),
        language=language,
        pruner=pruner,
    )
    for adaptation in backbone.adaptations:
        adaptation.check(model, restores=sparsifier.restores)
    for index, stage in zip(plan.stages, built, strict=True):
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
    attached_to(model).detach(model)
    return model


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """While the context lasts, the model runs unpruned.

    Raises:
        StateError: The model is not sparsified.
    """
    with attached_to(model).disabled():
        yield


def attached_to(model: nn.Module) -> Sparsifier | LanguagePruning:
    """What `sparsify` has attached to a model, also through wrappers such as DDP and `torch.compile`.

    Raises:
        StateError: The model is not sparsified.
    """
    inner = unwrap(model)
    attached = getattr(inner, "tokenprune", None)
    if not isinstance(attached, _ATTACHED):
        raise StateError(f"this {type(inner).__name__} is not sparsified; call tokenprune.sparsify(model) first.")
    return attached


def sparsifier_of(model: nn.Module) -> Sparsifier:
    """The sparsifier of a model, also through wrappers such as DDP and `torch.compile`.

    Raises:
        StateError: The model is not sparsified, or has no stages.
    """
    attached = attached_to(model)
    if isinstance(attached, LanguagePruning):
        raise StateError(
            f"this {type(unwrap(model)).__name__} was sparsified with stages=(), behind its vision tower alone, and "
            "this needs stages in the tower; sparsify it with stages, or the tower by itself."
        )
    return attached


def language_of(model: nn.Module) -> LanguagePruning | None:
    """What prunes the image tokens of a sparsified vision-language model; ``None`` of any other one.

    Raises:
        StateError: The model is not sparsified.
    """
    return attached_to(model).language


def refuse_prompts(model: nn.Module, function: str) -> None:
    """Refuse a vision-language model, which does not run on images alone.

    Raises:
        StateError: It is one; the message names the function to call.
    """
    if language_of(model) is not None:
        raise StateError(
            f"{type(unwrap(model)).__name__} reads prompts beside images; call tokenprune.{function}(model, inputs) "
            "with what its processor makes of both."
        )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers that hold it as ``module`` (DDP) or ``_orig_mod`` (`torch.compile`)."""
    for name in ("_orig_mod", "module"):
        inner = model._modules.get(name)
        if inner is not None and not isinstance(model._modules.get("tokenprune"), _ATTACHED):
            return unwrap(inner)
    return model


def _built(kind: type[Built], build: Callable[[Any], Any], context: Any, given: str) -> Built:
    """What a builder of scorers or reductions makes for a stage."""
    try:
        made = build(context)
    except UnsupportedModelError:
        raise
    except TypeError as error:  # a class in the place of a builder, as a rule
        raise TypeError(f"{given} cannot be called with a {type(context).__name__}: {error}") from error
    if not isinstance(made, kind):
        raise TypeError(f"{given} built a {type(made).__name__}; expected a tokenprune.{kind.__name__}.")
    return made


def _check_hierarchy(
    model: nn.Module, backbone: Backbone, reductions: Sequence[Reduction], pruned: str | ReductionBuilder
) -> None:
    if backbone.hierarchy is not None and not all(reduction.whole for reduction in reductions):
        kinds = ", ".join(sorted({type(block).__name__ for block in backbone.blocks}))
        why = f"the blocks of {type(model).__name__} ({kinds}) need the full grid of tokens."
        raise UnsupportedModelError(
            f"{backbone.hierarchy.obstacle or why} So pruned={pruned!r}, which takes tokens out of the sequence, is "
            "not for this model; pass pruned='fast', with which they stay and skip the expensive part of each block."
        )


def _check_scorers(plan: Plan, backbone: Backbone, stages: Sequence[Stage], scorer: str | ScorerBuilder) -> None:
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


def _language_of(model: nn.Module, pruner: str | Pruner | None) -> VisionLanguage | None:
    """What a vision-language model looks like; ``None`` of any other model, which takes no pruner."""
    language = vision_language_of(model) if isinstance(model, nn.Module) else None
    if language is None and pruner is not None:
        raise UnsupportedModelError(
            f"pruner={pruner!r} chooses image tokens for a language model, and {type(model).__name__} is no "
            "vision-language model that an adapter knows; its tokens are chosen by scorer=."
        )
    return language


def _check_pruner(model: nn.Module, language: VisionLanguage | None, pruner: str | Pruner | None) -> None:
    if language is not None and language.block is None and pruner in (None, "tower"):
        raise UnsupportedModelError(
            f"{type(model).__name__} makes image tokens of its patches in a way that leaves it unknown which of them "
            "the tower has kept; pass pruner=, such as pruner='diverse', to choose them behind the projector."
        )


def _check_behind_tower(
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


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(f"{type(model).__name__} is TorchScript; sparsify the Python model it came from.")
    for name, module in model.named_modules():
        if isinstance(module, _ATTACHED):
            where = f"its {name.removesuffix('.tokenprune')}" if name != "tokenprune" else "it"
            raise StateError(
                f"this {type(model).__name__} is sparsified already ({where} carries tokenprune); set "
                "model.tokenprune.keep_ratio for another ratio, or call tokenprune.unsparsify first."
            )
    if hasattr(model, "tokenprune"):
        raise StateError(f"this {type(model).__name__} has an attribute 'tokenprune' of its own; it is in the way.")
