"""Counting multiply-adds, dense and sparse side by side, by stage and by block.

One multiply-add counts 1, as in fvcore and in the papers of this field. The docs page "Counting FLOPs" says what is
counted and what is left out.
"""

from __future__ import annotations

import json
import statistics
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenprune.analysis.flop_handlers import HANDLERS, is_weightless
from tokenprune.analysis.flops_by_image import Costs, count_by_image
from tokenprune.api import dense, refuse_prompts, sparsifier_of, unwrap
from tokenprune.backbones.probing import eval_mode, random_inputs
from tokenprune.errors import CountingError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class FlopReport:
    """Multiply-adds of one image, or of the inputs that were given, unpruned and pruned.

    Attributes:
        input_size: Channels, height and width of the image; empty where inputs were given.
        keep_ratios: Cumulative keep ratios, one a stage.
        dense: Multiply-adds without pruning.
        sparse: Multiply-adds with pruning, stages included.
        dense_blocks: The share of each block, unpruned.
        sparse_blocks: The share of each block, pruned.
        stages: The share of each stage, its scorer and its reduction, in the pruned model.
        stage_blocks: Index of the block in front of which, or inside of which, each stage stands.
        by_image: Multiply-adds of each of the given images with pruning, as many tokens as the model keeps of it.
    """

    input_size: tuple[int, ...]
    keep_ratios: tuple[float, ...]
    dense: int
    sparse: int
    dense_blocks: tuple[int, ...]
    sparse_blocks: tuple[int, ...]
    stages: tuple[int, ...]
    stage_blocks: tuple[int, ...]
    by_image: tuple[int, ...] = ()

    @property
    def dense_gmacs(self) -> float:
        """Multiply-adds without pruning, in 10⁹."""
        return self.dense / 1e9

    @property
    def sparse_gmacs(self) -> float:
        """Multiply-adds with pruning, in 10⁹."""
        return self.sparse / 1e9

    @property
    def ratio(self) -> float:
        """Dense ÷ sparse: the speed-up to expect."""
        return self.dense / self.sparse

    @property
    def mean_gmacs(self) -> float | None:
        """The mean of `by_image`, in 10⁹; ``None`` where no images were given."""
        return statistics.mean(self.by_image) / 1e9 if self.by_image else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """Lower and upper quartile of `by_image`, in 10⁹; ``None`` where no two images were given."""
        if len(self.by_image) < 2:
            return None
        lower, _, upper = statistics.quantiles(self.by_image, n=4, method="inclusive")
        return lower / 1e9, upper / 1e9

    def to_json(self) -> str:
        """All attributes, and the figures derived from them, as a JSON object."""
        derived: dict[str, Any] = {
            "dense_gmacs": self.dense_gmacs,
            "sparse_gmacs": self.sparse_gmacs,
            "ratio": self.ratio,
        }
        derived |= {} if not self.by_image else {"mean_gmacs": self.mean_gmacs, "spread": self.spread}
        return json.dumps({**asdict(self), **derived})

    def table(self) -> Table:
        """The report as a rich table."""
        from rich.table import Table

        size = " × ".join(str(side) for side in self.input_size)
        what = f"one image of {size}" if size else "the given inputs"
        table = Table(title=f"Multiply-adds of {what}, in millions")
        for column in ("part", "dense", "sparse", "dense ÷ sparse"):
            table.add_column(column, justify="left" if column == "part" else "right")

        def row(name: str, before: int | None, after: int, style: str | None = None) -> None:
            numbers = ("" if before is None else f"{before / 1e6:,.1f}", f"{after / 1e6:,.1f}")
            table.add_row(name, *numbers, f"{before / after:.2f}" if before and after else "", style=style)

        for index, (before, after) in enumerate(zip(self.dense_blocks, self.sparse_blocks, strict=True)):
            if index in self.stage_blocks:
                stage = self.stage_blocks.index(index)
                row(f"stage {stage}, keeps {self.keep_ratios[stage]:.1%}", None, self.stages[stage], style="cyan")
            row(f"block {index}", before, after)
        rest = self.dense - sum(self.dense_blocks), self.sparse - sum(self.sparse_blocks) - sum(self.stages)
        row("everything else", *rest)
        table.add_section()
        row("all", self.dense, self.sparse, style="bold")
        return table

    def __str__(self) -> str:
        text = f"{self.dense_gmacs:.2f} GMACs dense, {self.sparse_gmacs:.2f} sparse, ratio {self.ratio:.2f}"
        if not self.by_image:
            return text
        text += f"; {self.mean_gmacs:.2f} on average over {len(self.by_image)} images"
        return text if self.spread is None else f"{text}, quartiles {self.spread[0]:.2f} … {self.spread[1]:.2f}"


def flops(
    model: nn.Module,
    input_size: Sequence[int] = (3, 224, 224),
    *,
    images: Tensor | None = None,
    inputs: Mapping[str, Any] | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
) -> FlopReport:
    """Count the multiply-adds of a sparsified model for one image, or for given inputs, unpruned and pruned.

    Pruned means with the plan's numbers of tokens. With an adaptive budget images keep other numbers, and cost as much
    as these only on average: give ``images`` to have each of them counted.

    Args:
        model: A sparsified model; its mode, weights and settings are left as they are.
        input_size: Channels, height and width of the image.
        images: (B, channels, height, width), inputs of the model, for `FlopReport.by_image`; their size takes the
            place of ``input_size``.
        inputs: All keyword arguments of a pass, for models that are given something else than an image, such as the
            patches of several images and their grids; the figures are those of the whole pass.
        forward_kwargs: What the model is called with besides the image, such as
            ``{"interpolate_pos_encoding": True}``.

    Returns:
        The counts, in all and by block and stage.

    Raises:
        StateError: The model is not sparsified, or reads prompts beside images; see `prefill_flops`.
        CountingError: An operator that may do multiply-adds has no handler; the message names it. Or the model needs
            ``inputs``.
        ValueError: There are both ``images`` and ``inputs``, or no tensor is among the latter.
    """
    inner = unwrap(model)
    refuse_prompts(model, "prefill_flops")
    if inputs is not None:
        return _of_inputs(model, inputs, images, forward_kwargs or {})
    if sparsifier_of(model).backbone.packed is not None:
        raise CountingError(
            f"{type(inner).__name__} is given the patches of images of different sizes, one after the other, and their "
            "grids, and not an image of input_size=…; pass all that it is called with: "
            "tokenprune.flops(model, inputs={…})."
        )
    if images is not None:
        input_size = images.shape[1:]
    with _counting(model, forward_kwargs or {}):
        image = random_inputs(inner, image=(1, *input_size))["image"]
        report = _report(model, image, tuple(input_size))
    if images is None:
        return report
    return replace(report, by_image=_by_image(model, images, report, forward_kwargs or {}))


def _of_inputs(
    model: nn.Module, inputs: Mapping[str, Any], images: Tensor | None, forward_kwargs: Mapping[str, Any]
) -> FlopReport:
    """The report of a pass with these keyword arguments."""
    if images is not None:
        raise ValueError("flops(images=…, inputs=…): pass images, or all that the model is called with, not both.")
    first = next((name for name, value in inputs.items() if isinstance(value, Tensor)), None)
    if first is None:
        raise ValueError(f"flops(inputs=…): no tensor is among {sorted(inputs)}; pass what the model is called with.")
    others = {name: value for name, value in inputs.items() if name != first}
    with _counting(model, {**others, **forward_kwargs}, first):
        return _report(model, inputs[first], ())


def _report(model: nn.Module, image: Tensor, input_size: tuple[int, ...]) -> FlopReport:
    """The report of a pass with this tensor, and what else the model is called with now."""
    inner = unwrap(model)
    with dense(inner):
        counts = count(inner, image)
    blocks = _names(inner, sparsifier_of(model).backbone.blocks)
    return FlopReport(
        input_size=input_size,
        dense=counts[""],
        dense_blocks=tuple(counts[name] for name in blocks),
        **_pruned(model, image),
    )


def _by_image(
    model: nn.Module, images: Tensor, report: FlopReport, forward_kwargs: Mapping[str, Any]
) -> tuple[int, ...]:
    """The multiply-adds of each of the images with pruning."""
    sparsifier, inner = sparsifier_of(model), unwrap(model)
    if sparsifier.thresholds_in_force is None:
        return (report.sparse,) * len(images)

    def costs(image: Tensor) -> Costs:
        counts = count(inner, image)
        blocks = [counts[name] for name in _names(inner, sparsifier.backbone.blocks)]
        stages = [counts[name] for name in _names(inner, sparsifier.stages)]
        return Costs(blocks, stages, counts[""] - sum(blocks) - sum(stages))

    with eval_mode(inner), sparsifier.executing(sparsifier.inference_execution), _called_with(inner, forward_kwargs):
        return count_by_image(inner, sparsifier, images, costs)


def recount(model: nn.Module, report: FlopReport) -> FlopReport:
    """The report of a model whose keep ratios have changed since: its dense part is not counted again."""
    with _counting(model, {}):
        image = random_inputs(unwrap(model), image=(1, *report.input_size))["image"]
        return replace(report, **_pruned(model, image))


@contextmanager
def _counting(model: nn.Module, forward_kwargs: Mapping[str, Any], first: str | None = None) -> Iterator[None]:
    inner, sparsifier = unwrap(model), sparsifier_of(model)
    with (
        eval_mode(inner),
        sparsifier.thawed(inner),
        sparsifier.budgeting("fixed"),
        sparsifier.executing(sparsifier.inference_execution),
        _called_with(inner, forward_kwargs, first),
    ):
        yield


def _pruned(model: nn.Module, image: Tensor) -> dict[str, Any]:
    """What a report says of the pruned pass."""
    sparsifier, inner = sparsifier_of(model), unwrap(model)
    counts = count(inner, image)
    return {
        "keep_ratios": sparsifier.plan.keep_ratios,
        "sparse": counts[""],
        "sparse_blocks": tuple(counts[name] for name in _names(inner, sparsifier.backbone.blocks)),
        "stages": tuple(counts[name] for name in _names(inner, sparsifier.stages)),
        "stage_blocks": sparsifier.plan.stages,
    }


def _names(model: nn.Module, modules: Iterable[nn.Module]) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[module] for module in modules]


def count(model: nn.Module, inputs: Tensor) -> Counter[str]:
    """Multiply-adds of one forward pass by module name; ``""`` is the whole model.

    Raises:
        CountingError: An operator that may do multiply-adds has no handler.
    """
    with _slow_path(), _no_leftover_hooks(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, of shapes and of deprecations in fvcore's own code
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(model, inputs)
        analysis.set_op_handle(**HANDLERS)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        by_module = analysis.by_module()
        unsupported = analysis.unsupported_ops()
    uncounted = {name: times for name, times in unsupported.items() if not is_weightless(name)}
    if uncounted:
        listed = ", ".join(f"{name} ({times} times)" for name, times in sorted(uncounted.items()))
        raise CountingError(
            f"cannot count {listed} in {type(model).__name__}: tokenprune has no handler for it, and would undercount. "
            "Please report the operator."
        )
    return Counter({name: int(number) for name, number in by_module.items()})


@contextmanager
def _called_with(model: nn.Module, kwargs: Mapping[str, Any], first: str | None = None) -> Iterator[None]:
    """Add keyword arguments to every call of the model; fvcore can only pass positional ones, the one by this name."""

    def add(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = {} if first is None else {first: args[0]}
        return args if first is None else (), {**given, **kwargs, **named}

    handle = model.register_forward_pre_hook(add, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _slow_path() -> Iterator[None]:
    """Without the fused path of nn.MultiheadAttention, one opaque operator to whoever counts."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _no_leftover_hooks(model: nn.Module) -> Iterator[None]:
    """Without the hooks that fvcore leaves in a model whose pass fails."""
    tables = [table for module in model.modules() for table in (module._forward_pre_hooks, module._forward_hooks)]
    before = [set(table) for table in tables]
    try:
        yield
    finally:
        for table, kept in zip(tables, before, strict=True):
            for added in table.keys() - kept:
                del table[added]
