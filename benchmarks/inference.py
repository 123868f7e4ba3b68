"""Does the measured speed-up keep what the counted one promises? ``python -m benchmarks.inference``."""

from __future__ import annotations

import copy
import statistics
from functools import partial
from typing import Annotated, Any, cast

import timm
import torch
import typer
from torch import Tensor, nn

import tokenprune
from benchmarks.measuring import Device, DType, Name, Pairs, Ratio, environment, measure_pairs, measure_rounds, report


class First(tokenprune.Scorer):
    """Keeps the first tokens, and costs next to nothing."""

    def forward(self, candidates: tokenprune.Candidates) -> Tensor:
        batch, number, _ = candidates.patches.shape
        return -torch.arange(number, device=candidates.patches.device).expand(batch, -1).float()


def shortened(model: nn.Module, plan: tokenprune.Plan, num_patches: int) -> nn.Module:
    """The model with its sequence cut off at the plan's stages, and nothing else: the speed-up there is to have."""
    made: Any = copy.deepcopy(model)
    for index, kept in zip(plan.stages, plan.num_keep(num_patches), strict=True):
        length = made.num_prefix_tokens + kept
        made.blocks[index].register_forward_pre_hook(
            lambda block, args, length=length: (args[0][:, :length].contiguous(), *args[1:])
        )
    return cast(nn.Module, made)


def main(
    model: Annotated[str, typer.Option(help="A Vision Transformer of timm.")] = "deit_small_patch16_224",
    batch_size: Annotated[list[int] | None, typer.Option(help="Give it several times.")] = None,
    keep_ratio: Annotated[list[float] | None, typer.Option(help="ρ; give it several times.")] = None,
    device: Device = "cpu",
    dtype: DType = "float32",
    pairs: Pairs = 21,
    name: Name = "inference-cpu",
) -> None:
    """Time dense and sparse inference in turn; then a free scorer, cut sequences, and hooks that prune nothing."""
    dense = timm.create_model(model).eval().to(device, getattr(torch, dtype))
    sparse = tokenprune.sparsify(copy.deepcopy(dense))
    free = tokenprune.sparsify(copy.deepcopy(dense), scorer=lambda context: First())
    input_size, num_patches = tuple(dense.pretrained_cfg["input_size"]), dense.patch_embed.num_patches
    rows, parts, data = [], [], []
    for batch in batch_size or [16, 1]:
        repeats = pairs if batch > 4 else 4 * pairs  # short ones scatter more
        images = torch.rand(batch, *input_size, device=device, dtype=getattr(torch, dtype))

        for ratio in keep_ratio or [0.9, 0.7, 0.5]:
            sparse.tokenprune.keep_ratio = free.tokenprune.keep_ratio = ratio
            counted = tokenprune.flops(sparse, input_size)
            models = (dense, sparse, shortened(dense, sparse.tokenprune.plan, num_patches), free)
            with torch.no_grad():
                times = measure_rounds([partial(each, images) for each in models], rounds=repeats, device=device)
            as_it_is, cut, blind = (Ratio(first_seconds=times[0], second_seconds=other) for other in times[1:])
            lower, upper = as_it_is.quartiles
            speeds = [batch / statistics.median(seconds) for seconds in times[:2]]
            rows.append(
                [
                    f"{batch}",
                    f"{ratio:g}",
                    f"{counted.dense_gmacs:.2f} → {counted.sparse_gmacs:.2f}",
                    f"{speeds[0]:.1f} → {speeds[1]:.1f}",
                    f"{counted.ratio:.2f}",
                    f"{as_it_is.median:.2f} ({lower:.2f} … {upper:.2f})",
                    f"**{as_it_is.median / counted.ratio:.2f}**",
                ]
            )
            parts.append(
                [f"{batch}", f"{ratio:g}", *(f"{x:.2f}" for x in (counted.ratio, cut.median, blind.median))]
                + [f"{as_it_is.median:.2f}", f"{sum(counted.stages) / counted.sparse:.1%}"]
            )
            measured = {"as_it_is": as_it_is, "cut_off": cut, "free_scorer": blind}
            data.append({"batch_size": batch, "keep_ratio": ratio, "gmac_ratio": counted.ratio, **measured})
        sparse.tokenprune.keep_ratio = 1.0
        with torch.no_grad():
            hooks = measure_pairs(partial(dense, images), partial(sparse, images), pairs=2 * repeats, device=device)
        lower, upper = hooks.quartiles
        rows.append(
            [
                f"{batch}",
                "1",
                "",
                "",
                "1.00",
                f"{hooks.median:.3f} ({lower:.3f} … {upper:.3f})",
                f"**{hooks.median:.3f}**",
            ]
        )
        data.append({"keep_ratio": 1.0, "batch_size": batch, "hooks": hooks})
    where = environment(device, dtype)
    report(
        name,
        f"{model}, dense → sparse, medians of {pairs} rounds ({4 * pairs} at batch sizes up to 4)",
        where,
        ("batch", "ρ", "GMACs", "images/s", "GMAC ratio", "speed-up (quartiles)", "speed-up ÷ GMAC ratio"),
        rows,
        data,
    )
    report(
        f"{name}-parts",
        "Speed-ups over the same dense model, in the same rounds",
        where,
        ("batch", "ρ", "GMAC ratio", "sequence cut off, no more", "with a free scorer", "as it is", "scorers' GMACs"),
        parts,
        [],
    )


if __name__ == "__main__":
    typer.run(main)
