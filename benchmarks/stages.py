"""Which operators a stage calls, with hooks and frozen, and how long they take: ``python -m benchmarks.stages``."""

from __future__ import annotations

import copy
import statistics
from collections import Counter
from collections.abc import Set
from contextlib import ExitStack
from typing import Annotated, Any, cast

import timm
import torch
import typer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import tokenprune
from benchmarks.frozen import DIGITS, SCORERS
from benchmarks.measuring import DType, Name, environment, input_size, report
from recipes.digits.model import load_dense_model

RANGE = "in front of a block"
SHORT = 5e-6
"""Operators that take less, whatever calls them, are one row."""


def main(
    model: Annotated[str, typer.Option(help=f"A Vision Transformer of timm, or {DIGITS}.")] = "deit_small_patch16_224",
    batch_size: Annotated[int, typer.Option(min=1, help="Images a pass.")] = 1,
    keep_ratio: Annotated[float, typer.Option(help="ρ: ρ, ρ², ρ³ of the patch tokens are kept.")] = 0.7,
    passes: Annotated[int, typer.Option(min=1, help="Passes of each model, in turn, of which times are medians.")] = 31,
    dtype: DType = "float32",
    name: Name = "stages-cpu",
) -> None:
    """Profile what stages do in front of their blocks, on a CPU, by scorer, with hooks and frozen."""
    torch.manual_seed(0)
    dense: Any = (load_dense_model() if model == DIGITS else timm.create_model(model)).eval()
    dense.to(dtype=getattr(torch, dtype))
    models: dict[str, nn.Module] = {}
    for scorer, label in SCORERS.items():
        sparse = tokenprune.sparsify(copy.deepcopy(dense), keep_ratio=keep_ratio, scorer=scorer)
        models[f"{label}, hooks"] = sparse
        models[f"{label}, frozen"] = tokenprune.freeze(copy.deepcopy(sparse))
    images = torch.rand(batch_size, *input_size(dense), dtype=getattr(torch, dtype))
    found = dict(zip(models, operators_of_stages(list(models.values()), images, passes), strict=True))
    longest: dict[str, float] = {}
    for of_model in found.values():
        for operator, (_, seconds) in of_model.items():
            longest[operator] = max(seconds, longest.get(operator, 0))
    named = [operator for operator in longest if longest[operator] >= SHORT]
    others, everything = longest.keys() - {*named}, longest.keys()
    rows = [[f"`{operator}`", *(_cell(one, {operator}) for one in found.values())] for operator in named]
    rows.append([f"others, below {1e6 * SHORT:.0f} µs each", *(_cell(one, others) for one in found.values())])
    rows.append(["all", *(f"**{_cell(one, everything)}**" for one in found.values())])
    report(
        name,
        f"{model}, batch {batch_size}, ρ = {keep_ratio:g}, a stage: how often operators are called, and their time by "
        f"PyTorch's profiler, medians of {passes} passes",
        environment("cpu", dtype),
        ("operator", *models),
        rows,
        found,
    )


def _cell(found: dict[str, tuple[float, float]], operators: Set[str]) -> str:
    calls, seconds = (sum(found[name][index] for name in operators & found.keys()) for index in (0, 1))
    return f"{calls:.3g}: {1e6 * seconds:.0f} µs" if calls else ""


@torch.no_grad()
def operators_of_stages(models: list[nn.Module], images: Tensor, passes: int) -> list[dict[str, tuple[float, float]]]:
    """What hooks call in front of the blocks behind stages: for each model calls and seconds a stage, by operator.

    Operators inside of others count as these. What is called inside of blocks, or behind them, does not count.

    Args:
        models: Sparsified models, frozen or not, on a CPU.
        images: (B, 3, H, W).
        passes: Of how many passes of each model, in turn, a time is the median; another one before them aside.
    """
    calls: list[Counter[str]] = [Counter() for _ in models]
    seconds: list[list[Counter[str]]] = [[] for _ in models]
    with ExitStack() as hooks:
        for model in models:
            for block in _stage_blocks(model):
                _mark(block, hooks)
            model(images)
        for _ in range(passes):
            for index, model in enumerate(models):
                with profile(activities=[ProfilerActivity.CPU]) as found:
                    model(images)
                called = [one for one in found.events() if one.cpu_parent is not None and one.cpu_parent.name == RANGE]
                calls[index] = Counter(one.name for one in called)
                spent: Counter[str] = Counter()
                for one in called:
                    spent[one.name] += one.cpu_time_total / 1e6
                seconds[index].append(spent)
    return [
        {
            name.removeprefix("aten::"): (
                number / len(_stage_blocks(model)),
                statistics.median(spent[name] for spent in of_passes) / len(_stage_blocks(model)),
            )
            for name, number in of_model.items()
        }
        for model, of_model, of_passes in zip(models, calls, seconds, strict=True)
    ]


def _stage_blocks(model: nn.Module) -> list[nn.Module]:
    sparsifier = cast(tokenprune.Sparsifier, model.tokenprune)
    return [sparsifier.backbone.blocks[block] for block in sparsifier.plan.stages]


def _mark(block: nn.Module, hooks: ExitStack) -> None:
    """Mark what hooks call in front of a block, as long as ``hooks`` is open."""
    open_ranges: list[Any] = []

    def begin(block: nn.Module, args: Any) -> None:
        open_ranges.append(record_function(RANGE))
        open_ranges[-1].__enter__()

    def end(block: nn.Module, args: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    for handle in (block.register_forward_pre_hook(begin, prepend=True), block.register_forward_pre_hook(end)):
        hooks.callback(handle.remove)


if __name__ == "__main__":
    typer.run(main)
