"""Is a plan as fast as asked when it is measured again? ``python -m benchmarks.planning``."""

from __future__ import annotations

from typing import Annotated, Any

import timm
import torch
import typer

import tokenprune
from benchmarks.measuring import Device, Name, Pairs, environment, input_size, report


def main(
    model: Annotated[str, typer.Option(help="A Vision Transformer of timm.")] = "deit_small_patch16_224",
    speedup: Annotated[list[float] | None, typer.Option(help="What to ask for; give it several times.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a pass.")] = 8,
    device: Device = "cpu",
    pairs: Pairs = 11,
    name: Name = "planning-cpu",
) -> None:
    """Find plans for speed-ups with `plan_for`, and measure each of them again, dense and pruned in turn."""
    torch.manual_seed(0)
    pruned: Any = tokenprune.sparsify(timm.create_model(model)).eval().to(device)
    size = input_size(pruned)
    rows, data = [], []
    for asked in speedup or [1.3, 1.5, 1.8]:
        plan = tokenprune.plan_for(pruned, speedup=asked, batch_size=batch_size, pairs=pairs)
        pruned.tokenprune.keep_ratio = plan.keep_ratios
        found = tokenprune.throughput(pruned, input_size=size, batch_size=batch_size, pairs=pairs)
        flops = tokenprune.flops(pruned, size)
        rows.append(
            [
                f"{asked:g}",
                ", ".join(f"{ratio:.3f}" for ratio in plan.keep_ratios),
                f"{flops.ratio:.3f}",
                f"**{found.speedup:.3f}**",
                f"{found.speedup / asked - 1:+.1%}",
            ]
        )
        data.append({"asked": asked, "keep_ratios": plan.keep_ratios, "gmac_ratio": flops.ratio, "again": found})
    report(
        name,
        f"{model}, batch {batch_size}, plans measured again in {pairs} pairs",
        environment(device, "float32"),
        ("speed-up asked", "ratios found", "dense ÷ pruned multiply-adds", "measured again", "off by"),
        rows,
        data,
    )


if __name__ == "__main__":
    typer.run(main)
