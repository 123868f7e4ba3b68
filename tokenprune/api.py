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
from tokenprune.backbones.probing import call, eval_mode, random_inputs
from tokenprune.backbones.vision_language import VisionLanguage
from tokenprune.errors import StateError, UnsupportedModelError
from tokenprune.pruning.executions import default_execution
from tokenprune.pruning.frozen import FrozenStage
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
from tokenprune.pruning.refusals import check_behind_tower, check_hierarchy, check_model, check_pruner, check_scorers
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
        scorer: Learned ones are ``"predictor"`` (DynamicViT's), ``"predictor_slim"`` (a twelfth of its cost) and
            ``"predictor_linear"`` (one linear layer). With nothing to learn: ``"cls_attention"`` (what a token receives
            in the block before the stage), ``"redundancy"`` (how much it differs from the others), ``"informative"``
            (both) and ``"tome"`` (ToMe's matching, whose stages stand inside of their blocks, between attention and
            MLP); ``"random"``, ``"static"``, or a callable that takes a `ScorerContext` and returns a new `Scorer`.
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
        check_behind_tower(model, scorer, pruned, pruner)
        behind = LanguagePruning(language, keep_ratio, pruner or "diverse")
        behind.train(model.training)
        behind.attach(model)
        return model
    check_model(model)
    check_pruner(model, language, pruner)
    backbone = describe(model) if backbone is None else backbone
    if not isinstance(backbone, Backbone):
        raise TypeError(f"backbone={type(backbone).__name__}: expected a tokenprune.Backbone that describes the model.")
    backbone.check(model)
    backbone = backbone.for_stages(stages)
    every = backbone.hierarchy is None and len(backbone.reach) == len(backbone.blocks)
    level = None if every else backbone.reach
    plan = Plan.build(depth=len(backbone.blocks), stages=stages, keep_ratio=keep_ratio, level=level)
    parts = Parts(model, backbone)
    reductions = []
    for number, probability in enumerate(plan.keep_probabilities):
        context = ReductionContext(backbone.embed_dim, probability, partial(parts.behind, plan, number))
        reductions.append(_built(Reduction, build_reduction, context, f"pruned={pruned!r}"))
    check_hierarchy(model, backbone, reductions, pruned)
    for reduction in reductions:
        reduction.check(backbone, reduction_name(pruned) or type(reduction).__name__)
    backbone = parts.described
    built = []
    for reduction, probability in zip(reductions, scored_shares(plan, reductions), strict=True):
        scorer_context = ScorerContext(backbone.embed_dim, probability, backbone.grid_size)
        built.append(Stage(_built(Scorer, build_scorer, scorer_context, f"scorer={scorer!r}"), reduction))
    check_scorers(plan, backbone, built, scorer)
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


def freeze(model: Model, inputs: Any = None) -> Model:
    """Leave of a sparsified model what serving at its present keep ratios needs: the shortest path.

    All hooks but one at each stage are taken out, and a stage ranks tokens, picks the best and gathers them, with the
    weights of a learned scorer folded into one another. It keeps no record: ``model.tokenprune.trace`` is ``None``.
    Where blocks are given something with an entry for each token, such as rotary tables, or attention keeps a bias for
    each pair of them, hooks behind the stages gather that, for the tokens that are left; where scorers look at
    attention, that of the block before their stage is recorded.

    Outputs differ by rounding alone. A frozen model runs in eval mode, at these keep ratios, and on images of any
    size; weights may still be loaded, and it is saved, exported and compiled like any other. A block with a stage in
    front of it that is called by itself prunes as it does in the model. `unfreeze` undoes it exactly, and so does
    `unsparsify`.

    Args:
        model: A sparsified model, possibly wrapped, in which nothing asks for pruned tokens behind their stage: whose
            reduction is ``"drop"``, ``"fuse"`` or ``"merge"``.
        inputs: What the model is called with once, to see what its blocks are given: a tensor, a tuple of positional
            arguments or a mapping of keyword arguments. ``None`` takes random images.

    Returns:
        ``model`` itself.

    Raises:
        StateError: It is not sparsified, or frozen already.
        UnsupportedModelError: It cannot be frozen; the message says why.

    Whatever is raised, the model is left as it was.
    """
    sparsifier = sparsifier_of(model)
    if sparsifier.frozen:
        raise StateError("the model is frozen already; call tokenprune.unfreeze(model) first.")
    if sparsifier.budget != "fixed":
        raise UnsupportedModelError(
            "a frozen model keeps equally many tokens of every image, and this model's budget is adaptive; set "
            "model.tokenprune.budget = 'fixed' first."
        )
    if sparsifier.language is not None:
        raise UnsupportedModelError(
            f"this {type(unwrap(model)).__name__} cannot be frozen: its language model is told which image tokens the "
            "tower has kept; freeze a vision tower by itself."
        )
    sparsifier.freeze(frozen_stages(model, inputs), unwrap(model))
    return model


def frozen_stages(
    model: nn.Module, inputs: Any = None, kind: type[FrozenStage] = FrozenStage
) -> tuple[FrozenStage, ...]:
    """The stages that a model would have frozen, of a kind; it is called once.

    Raises:
        UnsupportedModelError: It cannot be frozen; the message says why.
    """
    sparsifier, inner = sparsifier_of(model), unwrap(model)
    before = sparsifier.trace
    with (
        torch.no_grad(),
        eval_mode(inner),
        sparsifier.thawed(inner),
        sparsifier.executing(default_execution(training=False)),
    ):
        if inputs is None:
            inputs = random_inputs(inner, images=(1, *sparsifier.backbone.input_size(inner)))["images"]
        call(inner, inputs)
        trial, sparsifier.trace = sparsifier.trace, before
        obstacles = sparsifier.freezing_obstacles(trial)
        if obstacles or trial is None:
            raise UnsupportedModelError(f"this {type(inner).__name__} cannot be frozen: {'; '.join(obstacles)}.")
        return sparsifier.frozen_stages(trial, kind)


def unfreeze(model: Model) -> Model:
    """Give a frozen model back what `freeze` has taken out.

    Returns:
        ``model`` itself.

    Raises:
        StateError: It is not frozen.
    """
    sparsifier = sparsifier_of(model)
    if not sparsifier.frozen:
        raise StateError("the model is not frozen.")
    sparsifier.unfreeze(unwrap(model))
    return model


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


def _language_of(model: nn.Module, pruner: str | Pruner | None) -> VisionLanguage | None:
    """What a vision-language model looks like; ``None`` of any other model, which takes no pruner."""
    language = vision_language_of(model) if isinstance(model, nn.Module) else None
    if language is None and pruner is not None:
        raise UnsupportedModelError(
            f"pruner={pruner!r} chooses image tokens for a language model, and {type(model).__name__} is no "
            "vision-language model that an adapter knows; its tokens are chosen by scorer=."
        )
    return language
