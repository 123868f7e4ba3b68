"""Accuracy over a validation split, on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

import tokenprune
from recipes.engine.data import first_batches


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: nn.Module, loader: DataLoader[Any], *, batches: int | None = None
) -> dict[str, float]:
    """Accuracy of a model in eval mode.

    Args:
        accelerator: Gathers the results of all processes.
        model: On the accelerator's device.
        loader: Prepared batches of images and class indices.
        batches: Evaluate on only this many batches per process.

    Returns:
        ``top1`` and ``top5`` as fractions, ``top5`` only with five classes or more; for a sparsified model
        ``kept_1``, ``kept_2`` …, the fraction of patch tokens that each stage keeps.
    """
    correct: dict[int, int] = {1: 0, 5: 0}
    total = num_classes = 0
    kept: list[float] = []
    with _eval_mode(model):
        for images, targets in first_batches(loader, batches):
            with accelerator.autocast():
                logits = model(images)
            logits, targets = accelerator.gather_for_metrics((logits, targets))
            num_classes = logits.shape[-1]
            ranked = logits.topk(min(5, num_classes), dim=-1).indices == targets[:, None]  # (B, 5)
            correct = {k: correct[k] + int(ranked[:, :k].sum()) for k in correct}
            total += len(targets)
            kept = kept_ratios(model)
    if total == 0:
        raise ValueError("there are no images to evaluate on.")
    scores = {f"top{k}": correct[k] / total for k in correct if num_classes >= k}
    return {**scores, **{f"kept_{stage}": ratio for stage, ratio in enumerate(kept, start=1)}}


def evaluate_both(
    accelerator: Accelerator, model: nn.Module, loader: DataLoader[Any], *, batches: int | None = None
) -> dict[str, float]:
    """Accuracy of a model, and, if it is sparsified, of its dense path under ``dense_top1`` and ``dense_top5``."""
    scores = evaluate(accelerator, model, loader, batches=batches)
    if not is_sparsified(model):
        return scores
    with tokenprune.dense(model):
        dense = evaluate(accelerator, model, loader, batches=batches)
    return {**scores, **{f"dense_{name}": value for name, value in dense.items()}}


def kept_ratios(model: nn.Module) -> list[float]:
    """The fraction of patch tokens that each stage kept in the last forward pass; empty for a dense one."""
    sparsifier: Any = getattr(model, "tokenprune", None)
    trace = None if sparsifier is None else sparsifier.trace
    if not isinstance(trace, tokenprune.Trace):
        return []
    return [float(keep.sum(dim=1).mean()) / trace.num_patches for keep in trace.keep]


def is_sparsified(model: nn.Module) -> bool:
    """Whether `tokenprune.sparsify` was called on a model."""
    return isinstance(getattr(model, "tokenprune", None), tokenprune.Sparsifier)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
