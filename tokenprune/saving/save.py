"""Writing a sparsified model into a folder."""

from __future__ import annotations

import logging
import shutil
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from tokenprune.api import sparsifier_of, unwrap
from tokenprune.backbones.adaptations import Setting
from tokenprune.errors import CheckpointError, TokenpruneError, UnsupportedModelError
from tokenprune.pruning.parts import parts_behind
from tokenprune.pruning.reductions import ReductionContext, reduction_builder
from tokenprune.pruning.sparsifier import Sparsifier
from tokenprune.pruning.stage import Stage
from tokenprune.saving import card, weights
from tokenprune.saving.manifest import MANIFEST, WEIGHTS, Manifest
from tokenprune.saving.rebuilding import Identity, identify
from tokenprune.scorers import ScorerContext, scorer_builder

_logger = logging.getLogger(__name__)
_PREFIX = "tokenprune."


def save_pretrained(
    model: nn.Module, folder: str | Path, *, scorers_only: bool = False, model_card: bool = True
) -> Path:
    """Write a sparsified model into a folder, from which `from_pretrained` brings it back.

    The folder gets ``tokenprune.safetensors``, the weights in their dtypes; ``tokenprune.json``, the plan, the
    scorer's name and what the base model is built from; and ``README.md``, a model card with the table of
    multiply-adds. Everything is written aside first and then moved in, so that there is never half a checkpoint;
    other files in the folder stay. Of several processes, let one save.

    Args:
        model: A sparsified model, also inside DDP or `torch.compile`; it is left as it is.
        folder: Made where it does not exist. What an earlier call wrote there is replaced.
        scorers_only: Save the scorers without the base model, a file of a few megabytes to share beside public
            weights.
        model_card: Whether to write ``README.md``, which takes two traced forward passes. One that somebody
            else wrote is left alone in any case.

    Returns:
        The folder.

    Raises:
        StateError: The model is not sparsified.
        CheckpointError: Its state dict holds something that is no tensor or has no data, or ``folder`` is a file.

    Warns:
        UserWarning: The model cannot be built again from what is saved, because it is user-written or modified, or
            its scorer, reduction or pruner has no registered name: `from_pretrained` then needs ``model=`` or that
            argument. The warning says why.
    """
    sparsifier, inner, folder = sparsifier_of(model), unwrap(model), Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give the folder in which to save.")
    with torch.random.fork_rng(devices=[]):  # models and scorers are built to compare, and random ones counted
        manifest = _manifest(inner, sparsifier, scorers_only)
        text = card.card(inner, manifest) if model_card and card.may_write(folder) else None
    state = {name: tensor for name, tensor in inner.state_dict().items() if name != f"{_PREFIX}_extra_state"}
    if scorers_only:
        state = {name: tensor for name, tensor in state.items() if name.startswith(_PREFIX)}

    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}"
    aside.mkdir()
    try:
        weights.write(aside / WEIGHTS, state)
        (aside / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        if text is not None:
            (aside / card.FILE).write_text(text, encoding="utf-8")
        _move_in(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _move_in(aside: Path, folder: Path) -> None:
    if not folder.exists():
        aside.rename(folder)
        return
    # An interruption in here leaves a folder without manifest, which is no checkpoint, and not a mixed one.
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in (card.FILE, WEIGHTS, MANIFEST):
        if (aside / name).exists():
            (aside / name).replace(folder / name)


def _manifest(model: nn.Module, sparsifier: Sparsifier, scorers_only: bool) -> Manifest:
    record = sparsifier.record
    if record.scorer is not None and not _scorers_fit(sparsifier, record.scorer):
        record = replace(record, scorer=None)
    if record.pruned is not None and not _reductions_fit(sparsifier, record.pruned):
        record = replace(record, pruned=None)
    names = [("scorer=builder", "scorer", record.scorer), ("pruned=builder", "reduction", record.pruned)]
    names += [] if record.language is None else [("pruner=function", "pruner", record.language.pruner)]
    for option, what, name in names:
        if name is None:
            warnings.warn(
                f"the {what} has no registered name, so tokenprune.from_pretrained will need {option}; "
                f"@tokenprune.register_{what}(name) gives it one.",
                stacklevel=3,
            )
    identity: Identity | None = None
    reason: str | None = None
    try:
        identity = identify(model, [one.name for one in sparsifier.backbone.adaptations if isinstance(one, Setting)])
    except UnsupportedModelError as error:
        reason = str(error)
        warnings.warn(
            f"tokenprune.from_pretrained will need model=, the dense model to load into: {reason}", stacklevel=3
        )
    return Manifest(
        record=record,
        scorers_only=scorers_only,
        model_class=f"{type(model).__module__}.{type(model).__qualname__}",
        depth=len(sparsifier.backbone.blocks),
        embed_dim=sparsifier.backbone.embed_dim,
        library=identity.library if identity else None,
        identity=identity.fields if identity else None,
        why_no_identity=reason,
        buffer_dtypes=identity.buffer_dtypes if identity else {},
        blocks_sha256=weights.digest(sparsifier.backbone.blocks) if scorers_only else None,
        versions=_versions("tokenprune", "torch", *([identity.library] if identity else [])),
    )


def _scorers_fit(sparsifier: Sparsifier, name: str) -> bool:
    """Whether the registered scorer of that name makes scorers like those in the stages, which users may replace."""
    backbone, probabilities = sparsifier.backbone, sparsifier.keep_probabilities
    contexts = [ScorerContext(backbone.embed_dim, probability, backbone.grid_size) for probability in probabilities]
    return _are_like([stage.scorer for stage in _stages(sparsifier)], scorer_builder, name, contexts)


def _reductions_fit(sparsifier: Sparsifier, name: str) -> bool:
    """Whether the registered reduction of that name makes reductions like those in the stages."""
    plan, backbone = sparsifier.plan, sparsifier.backbone
    contexts = [
        ReductionContext(backbone.embed_dim, probability, partial(parts_behind, backbone, plan, stage))
        for stage, probability in enumerate(plan.keep_probabilities)
    ]
    return _are_like([stage.reduction for stage in _stages(sparsifier)], reduction_builder, name, contexts)


def _stages(sparsifier: Sparsifier) -> list[Stage]:
    return [cast(Stage, stage) for stage in sparsifier.stages]


def _are_like(
    modules: Sequence[nn.Module], resolve: Callable[[str], Callable[..., nn.Module]], name: str, contexts: Sequence[Any]
) -> bool:
    """Whether what is registered under a name builds modules of the classes and the shapes of those given."""
    for own, context in zip(modules, contexts, strict=True):
        try:
            made = resolve(name)(context)
        except (TokenpruneError, ValueError, TypeError) as error:
            _logger.warning("what is registered as %r cannot be built again: %s", name, error)
            return False
        shapes = [{key: value.shape for key, value in module.state_dict().items()} for module in (made, own)]
        if type(made) is not type(own) or shapes[0] != shapes[1]:
            return False
    return True


def _versions(*packages: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a package that is imported from a folder
            continue
    return found
