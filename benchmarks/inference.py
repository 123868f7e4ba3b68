"""Does the measured speed-up keep what the counted one promises? ``python -m benchmarks.inference``."""

from __future__ import annotations

import copy
from dataclasses import asdict
from functools import partial
from typing import Annotated

import timm
import torch
import typer

import tokenprune
from benchmarks.measuring import Device, DType, Name, Pairs, environment, measure_pairs, report


def main(
    model: Annotated[str, typer.Option(help="A Vision Transformer of timm.")] = "deit_small_patch16_224",
    batch_size: Annotated[list[int] | None, typer.Option(help="Give it several times.")] = None,
    keep_ratio: Annotated[list[float] | None, typer.Option(help="ρ; give it several times.")] = None,
    device: Device = "cpu",
    dtype: DType = "float32",
    pairs: Pairs = 21,
    name: Name = "inference-cpu",
) -> None:
    """Time dense and sparse inference in turn, and a model with hooks that prune nothing against one without."""
    untouched = timm.create_model(model).eval().to(device, getattr(torch, dtype))
    sparse = tokenprune.sparsify(copy.deepcopy(untouched))
    input_size = tuple(untouched.pretrained_cfg["input_size"])
    rows, data = [], []
    for batch in batch_size or [16, 1]:
        repeats = pairs if batch > 4 else 4 * pairs  # short ones scatter more
        for ratio in keep_ratio or [0.9, 0.7, 0.5]:
            sparse.tokenprune.keep_ratio = ratio
            counted = tokenprune.flops(sparse, input_size)
            timed = tokenprune.throughput(sparse, input_size, batch_size=batch, pairs=repeats)
            lower, upper = timed.spread
            rows.append(
                [
                    f"{batch}",
                    f"{ratio:g}",
                    f"{counted.dense_gmacs:.2f} → {counted.sparse_gmacs:.2f}",
                    f"{timed.dense_images_per_second:.1f} → {timed.sparse_images_per_second:.1f}",
                    f"{counted.ratio:.2f}",
                    f"{timed.speedup:.2f} ({lower:.2f} … {upper:.2f})",
                    f"**{timed.speedup / counted.ratio:.2f}**",
                ]
            )
            data.append({"keep_ratio": ratio, "gmac_ratio": counted.ratio, **asdict(timed)})
        sparse.tokenprune.keep_ratio = 1.0
        images = torch.rand(batch, *input_size, device=device, dtype=getattr(torch, dtype))
        with torch.no_grad():
            hooks = measure_pairs(partial(sparse, images), partial(untouched, images), pairs=2 * repeats, device=device)
        lower, upper = hooks.quartiles
        rows.append(
            [
                f"{batch}", "1, hooks only", "", "", "1.00",
                f"{1 / hooks.median:.3f} ({1 / upper:.3f} … {1 / lower:.3f})", f"**{1 / hooks.median:.3f}**",
            ]
        )  # fmt: skip
        data.append({"keep_ratio": 1.0, "batch_size": batch, "hooks": hooks})
    report(
        name,
        f"{model}, dense → sparse, medians of {pairs} pairs ({4 * pairs} at batch sizes up to 4)",
        environment(device, dtype),
        ("batch", "ρ", "GMACs", "images/s", "GMAC ratio", "speed-up (quartiles)", "speed-up ÷ GMAC ratio"),
        rows,
        data,
    )


if __name__ == "__main__":
    typer.run(main)
