"""Checking the invariants on a user's own model and inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.api import dense, language_of, sparsifier_of
from tokenprune.backbones.probing import call, eval_mode, kept_modes, named_outputs
from tokenprune.errors import TokenpruneError
from tokenprune.pruning.executions import default_execution, executions
from tokenprune.pruning.sparsifier import Sparsifier
from tokenprune.pruning.trace import Trace
from tokenprune.scorers import Candidates, Scorer
from tokenprune.tokens import select


@dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """What `verify` found.

    Differences are the largest over all outputs, relative to the output's largest magnitude. Of an
    output with an entry for each token, those of the tokens that are left are compared.

    Attributes:
        identity: Between the model with nothing pruned and the unpruned model.
        mask_equals_gather: Between the executions, for the same decisions: the largest to that of inference.
        effect: Between the pruned and the unpruned model; 0 means pruning changes nothing.
        gradients: For each stage the largest gradient of its parameters, those of its scorer and its reduction, after
            a training step; NaN if one is not finite or missing, and no entry for stages without parameters, stages
            that keep all and models that can only be trained in parts.
        compared: Number of output tensors that were compared.
        not_compared: Names of those that could not be, since neither all tokens nor those left explain
            their shape.
        tolerance: Up to which difference the two invariants hold.
        cannot_run: Executions, besides those of training and inference, in which the model cannot run, with the reason.
    """

    identity: float
    mask_equals_gather: float
    effect: float
    gradients: tuple[float, ...]
    compared: int
    not_compared: tuple[str, ...]
    tolerance: float
    cannot_run: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every invariant holds."""
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """What does not hold, a sentence each."""
        found = []
        if not self.compared:
            found.append("there is no output that could be compared")
        if self.not_compared:
            listed = ", ".join(self.not_compared)
            found.append(
                f"{listed}: the shape differs pruned and unpruned in a way that the tokens left do not explain"
            )
        if not self.identity <= self.tolerance:
            found.append(f"with nothing pruned, outputs differ from the dense model's by {self.identity:.1e}")
        if not self.mask_equals_gather <= self.tolerance:
            found.append(f"for the same decisions, executions differ by {self.mask_equals_gather:.1e}")
        if not self.effect > 0:
            found.append("pruning has no effect on the outputs")
        for stage, gradient in enumerate(self.gradients):
            if not (math.isfinite(gradient) and gradient > 0):
                found.append(f"a parameter of stage {stage} gets no finite gradient")
        return tuple(found)

    def __str__(self) -> str:
        lines = [
            f"identity {self.identity:.1e}, mask = gather {self.mask_equals_gather:.1e}; "
            f"tolerance {self.tolerance:.0e}",
            f"effect of pruning {self.effect:.1e}, over {self.compared} outputs",
            "largest gradient of each scorer: " + ", ".join(f"{gradient:.1e}" for gradient in self.gradients),
        ]
        lines += [f"not in {name!r} execution: {reason}" for name, reason in self.cannot_run.items()]
        return "\n".join([*lines, *(f"FAILED: {failure}" for failure in self.failures)])


def verify(model: nn.Module, inputs: Any, *, tolerance: float = 1e-4) -> VerificationReport:
    """Check the invariants on a sparsified model.

    In eval mode a pass is made unpruned, one with nothing pruned and one in each execution, and in training mode one
    more, in which every masked block must be seen to attend. Weights, gradients, modes and settings are afterwards
    what they were.

    Args:
        model: A sparsified model.
        inputs: A tensor, a tuple of positional or a mapping of keyword arguments; at least two
            images, so that decisions that differ between images are tried.
        tolerance: The largest relative difference that counts as equal; for float32.

    Raises:
        StateError: The model is not sparsified.
        InterceptionError: A masked block's attention could not be masked.
    """
    sparsifier = sparsifier_of(model)
    with _unchanged(model, sparsifier):
        with eval_mode(model), torch.no_grad():
            with dense(model):
                unpruned = _run(model, inputs)
            ratios, language = sparsifier.keep_ratio, sparsifier.language
            behind = None if language is None else language.keep_ratio
            sparsifier.keep_ratio = 1.0
            kept_all = _run(model, inputs)
            sparsifier.keep_ratio = ratios
            if language is not None and behind is not None:
                language.keep_ratio = behind
            with _hashed_scores(sparsifier):
                reference, gathered = _in_execution(default_execution(training=False), model, sparsifier, inputs)
                others, cannot_run = _in_other_executions(reference.execution, model, sparsifier, inputs)
        # What follows such a tower cannot be trained through it.
        trains = sparsifier.backbone.downstream != "any number" or sparsifier.restores
        gradients = _gradients(model, sparsifier, inputs) if trains else ()
    unpruned_left = _of_tokens_left(unpruned, gathered, None, reference)
    cut = [_of_tokens_left(outputs, gathered, trace, reference) for trace, outputs in others]
    without_summaries = {name: _without_summaries(tokens, reference) for name, tokens in gathered.items()}
    comparable = [
        name
        for name, tokens in gathered.items()
        if name in unpruned_left
        and without_summaries[name].shape == unpruned_left[name].shape
        and all(name in outputs and outputs[name].shape == tokens.shape for outputs in cut)
    ]
    return VerificationReport(
        identity=_difference(kept_all, unpruned, list(unpruned)),
        mask_equals_gather=_largest([_difference(outputs, gathered, comparable) for outputs in cut]),
        effect=_difference(without_summaries, unpruned_left, comparable),
        gradients=gradients,
        compared=len(comparable),
        not_compared=tuple(sorted(unpruned.keys() ^ gathered.keys() | gathered.keys() - set(comparable))),
        tolerance=tolerance,
        cannot_run=cannot_run,
    )


class _Hashed(Scorer):
    """Scores that differ by position and image and are the same in every execution."""

    def forward(self, candidates: Candidates) -> Tensor:
        patches = candidates.patches
        image = torch.arange(patches.shape[0], device=patches.device)[:, None]
        position = torch.arange(candidates.num_patches, device=patches.device).expand(patches.shape[0], -1)
        # Multiples of a number of the image's own modulo a prime: a permutation of the positions that differs from
        # image to image, in which no two scores are equal, whatever the rounding.
        return candidates.at_candidates((position * (550007 + 104729 * image) % 1299709).to(torch.float32))


@contextmanager
def _hashed_scores(sparsifier: Sparsifier) -> Iterator[None]:
    scorers = [stage.scorer for stage in sparsifier.stages]
    for stage in sparsifier.stages:
        stage.scorer = _Hashed()
    try:
        yield
    finally:
        for stage, scorer in zip(sparsifier.stages, scorers, strict=True):
            stage.scorer = scorer


@contextmanager
def _unchanged(model: nn.Module, sparsifier: Sparsifier) -> Iterator[None]:
    """Restore what a training step and other settings change."""
    plan, execution, budget = sparsifier.plan, sparsifier.execution, sparsifier.budget
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    sparsifier.budget = "fixed"
    try:
        yield
    finally:
        sparsifier.keep_ratio, sparsifier.execution = plan.keep_ratios, execution
        sparsifier.budget = budget
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for buffer, before in buffers.items():
            buffer.copy_(before)


def _gradients(model: nn.Module, sparsifier: Sparsifier, inputs: Any) -> tuple[float, ...]:
    for parameter in model.parameters():
        parameter.grad = None
    sparsifier.execution = default_execution(training=True)
    with kept_modes(model), torch.enable_grad():
        model.train()
        outputs = _run(model, inputs)
        torch.stack([output.float().square().mean() for output in outputs.values()]).sum().backward()
    found = []
    for stage, probability in zip(sparsifier.stages, sparsifier.keep_probabilities, strict=True):
        if probability == 1:
            continue
        parameters = [parameter for parameter in stage.parameters() if parameter.requires_grad]
        if parameters:
            found.append(_magnitude([parameter.grad for parameter in parameters]))
    return tuple(found)


def _magnitude(gradients: list[Tensor | None]) -> float:
    """The largest entry; NaN if a gradient is missing or has an entry that is not finite."""
    if any(gradient is None or not bool(gradient.isfinite().all()) for gradient in gradients):
        return math.nan
    return max(float(gradient.abs().max()) for gradient in gradients if gradient is not None)


def _in_execution(name: str, model: nn.Module, sparsifier: Sparsifier, inputs: Any) -> tuple[Trace, dict[str, Tensor]]:
    """The record and the outputs of a pass in an execution."""
    sparsifier.execution = name
    outputs = _run(model, inputs)
    assert sparsifier.trace is not None
    return sparsifier.trace, outputs


def _in_other_executions(
    done: str, model: nn.Module, sparsifier: Sparsifier, inputs: Any
) -> tuple[list[tuple[Trace, dict[str, Tensor]]], dict[str, str]]:
    """The same of all executions but the one that is ``done``, and why others refuse the model."""
    passes, cannot_run = [], {}
    for name in executions():
        if name == done:
            continue
        try:
            passes.append(_in_execution(name, model, sparsifier, inputs))
        except Exception as error:  # ours, or the model's own, whose blocks do not take what they are given
            if name == default_execution(training=True):
                raise
            known = isinstance(error, TokenpruneError)
            cannot_run[name] = str(error) if known else f"{type(error).__name__}: {error}"
    return passes, cannot_run


def _run(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    language = language_of(model)
    fewer = () if language is None else tuple(f"output.{name}" for name in language.described.outputs)
    return {name: tensor for name, tensor in named_outputs(call(model, inputs)).items() if not name.startswith(fewer)}


def _of_tokens_left(
    outputs: Mapping[str, Tensor], gathered: Mapping[str, Tensor], trace: Trace | None, reference: Trace
) -> dict[str, Tensor]:
    """The outputs, where they have all tokens and ``gathered`` those left after a stage, with these alone.

    Args:
        outputs: Of a pass in which tokens stay.
        gathered: Of the pass in which they were removed.
        trace: Of the former; ``None`` for an unpruned pass, whose sequences have no summary tokens.
        reference: Of the latter.
    """

    def cut(tokens: Tensor, left: Tensor) -> Tensor:
        if tokens.dim() != 3 or tokens.shape == left.shape or tokens.shape[0] != left.shape[0]:
            return tokens
        wanted = left if trace is not None else _without_summaries(left, reference)
        for num_prefix, stage in product(_prefixes(reference), reversed(range(len(reference.selections)))):
            selection = reference.selections[stage]
            assert selection.indices is not None
            after = selection.layout if trace is not None else selection.layout.replace(num_summary=0)
            layout = reference.full_layout if trace is None else trace.selections[stage].layout
            layout, after = layout.replace(num_prefix=num_prefix), after.replace(num_prefix=num_prefix)
            if tokens.shape[1] == layout.length and wanted.shape[1] == after.length:
                return select(tokens, layout.positions(selection.indices))
        return tokens

    return {name: cut(tokens, gathered[name]) for name, tokens in outputs.items() if name in gathered}


def _without_summaries(tokens: Tensor, trace: Trace) -> Tensor:
    """An output, where it is the sequence behind a stage, without summary tokens."""
    if tokens.dim() != 3 or trace.restored:
        return tokens
    for num_prefix, selection in product(_prefixes(trace), reversed(trace.selections)):
        layout = selection.layout.replace(num_prefix=num_prefix)
        if layout.num_summary and layout.length == tokens.shape[1]:
            return layout.without_summaries(tokens)
    return tokens


def _prefixes(trace: Trace) -> tuple[int, ...]:
    """How many prefix tokens a sequence among the outputs may have."""
    return trace.start.layout.num_prefix, trace.num_prefix_tokens, 0


def _difference(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], names: list[str]) -> float:
    differences = [
        float((actual[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-12))
        for name in names
        if actual[name].shape == expected[name].shape
    ]
    return _largest(differences)


def _largest(differences: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, differences)) else max(differences, default=math.nan)
