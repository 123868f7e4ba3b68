"""How much faster do fast paths make hierarchies, and where does the time go? ``python -m benchmarks.hierarchies``."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, cast

import timm
import torch
import typer
from torch import nn
from torch.profiler import ProfilerActivity, profile

import tokenprune
from benchmarks.measuring import Device, DType, Name, Pairs, environment, report
from recipes.hierarchy import REDUCTION, keep_ratios

MODELS = ("swin_small_patch4_window7_224", "convnext_small")
KINDS = {
    "linear layers": ("addmm", "mm", "linear"),
    "convolutions": ("convolution", "conv2d", "conv"),
    "attention": ("scaled_dot_product", "bmm", "softmax"),
    "norms": ("norm",),
    "activations": ("gelu",),
    "copies": ("copy_", "index_select", "index_copy_", "cat", "clone", "roll", "gather"),
}
"""Operators of PyTorch by what they are for; the first kind of which a name has a part counts. Others are the rest."""


def main(
    model: Annotated[list[str] | None, typer.Option(help="A hierarchy of timm; give it several times.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 16,
    keep_ratio: Annotated[float, typer.Option(help="ρ; the stages keep ρ, ρ − 0.2, ρ − 0.4.")] = 0.7,
    passes: Annotated[int, typer.Option(min=1, help="Passes over which operators are timed.")] = 3,
    device: Device = "cpu",
    dtype: DType = "float32",
    pairs: Pairs = 10,
    name: Name = "hierarchies-cpu",
) -> None:
    """Time hierarchies, dense and with fast paths in turn, and their operators."""
    rows: list[Sequence[str]] = []
    data: list[dict[str, Any]] = []
    parts: list[Sequence[str]] = []
    for one in model or MODELS:
        torch.manual_seed(0)
        sparse = timm.create_model(one).eval()
        tokenprune.sparsify(sparse, keep_ratio=keep_ratios(keep_ratio), pruned=REDUCTION)
        counted = tokenprune.flops(sparse)
        sparse = sparse.to(device, getattr(torch, dtype))
        timed = tokenprune.throughput(sparse, batch_size=batch_size, pairs=pairs)
        lower, upper = timed.spread
        per_second = (timed.dense_images_per_second, timed.sparse_images_per_second)
        rows.append(
            [
                one,
                *(f"{speed:.1f}" for speed in per_second),
                f"**{timed.speedup:.2f}** ({lower:.2f} … {upper:.2f})",
                f"{counted.ratio:.2f}",
                f"**{timed.speedup / counted.ratio:.2f}**",
            ]
        )
        dense_kinds, sparse_kinds = _kinds(sparse, batch_size, passes)
        for kind in (*KINDS, "the rest"):
            pair = (dense_kinds[kind], sparse_kinds[kind])
            parts.append(
                [one, kind, *(f"{1e3 * seconds:.0f}" for seconds in pair), f"{1e3 * (pair[1] - pair[0]):+.0f}"]
            )
        data.append(
            {
                "model": one, "batch_size": batch_size, "speedup": timed.speedup, "gmac_ratio": counted.ratio,
                "operators": {"dense": dense_kinds, "sparse": sparse_kinds},
            }
        )  # fmt: skip
    title = f"ρ = {keep_ratio:g}, batch {batch_size}"
    columns = ("model", "images/s dense", "images/s", "speed-up (quartiles)", "GMAC ratio", "speed-up ÷ GMAC ratio")
    about = environment(device, dtype)
    report(name, f"Hierarchies, {title}, medians of {pairs} pairs", about, columns, rows, data)
    heads = ("model", "operators", "ms dense", "ms", "difference")
    report(f"{name}-operators", f"Operators, {title}, medians of {passes} passes", about, heads, parts, [])


@torch.no_grad()
def _kinds(model: nn.Module, batch_size: int, passes: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a batch by kind of operator, dense and sparse, in turn."""
    parameter = next(model.parameters())
    size = cast(tokenprune.Sparsifier, model.tokenprune).backbone.input_size(model)
    images = torch.randn(batch_size, *size, device=parameter.device, dtype=parameter.dtype)
    seconds: tuple[list[Counter[str]], list[Counter[str]]] = ([], [])
    for _ in range(passes + 1):  # the first one warms up
        with tokenprune.dense(model):
            seconds[0].append(_profiled(model, images))
        seconds[1].append(_profiled(model, images))
    dense, sparse = (
        {kind: statistics.median(one[kind] for one in runs[1:]) for kind in (*KINDS, "the rest")} for runs in seconds
    )
    return dense, sparse


def _profiled(model: nn.Module, images: torch.Tensor) -> Counter[str]:
    on_gpu = images.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        model(images)
    spent: Counter[str] = Counter()
    for operator in found.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(part in operator.key for part in parts)), "the rest")
        spent[kind] += (operator.self_device_time_total if on_gpu else operator.self_cpu_time_total) / 1e6
    return spent


if __name__ == "__main__":
    typer.run(main)
