"""Does the measured speed-up keep what the counted one promises? ``python -m benchmarks.inference``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, cast

import timm
import torch
import typer
from torch import Tensor, nn

import tokenprune
from benchmarks.measuring import (
    Device,
    DType,
    Name,
    Pairs,
    Ratio,
    environment,
    input_size,
    measure_rounds,
    peak_bytes,
    report,
)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Dense against sparse inference at one keep ratio.

    Attributes:
        batch_size: Images a batch.
        keep_ratio: ρ.
        counted: The multiply-adds.
        speedup: Dense ÷ sparse seconds.
        dense_peak_bytes: Most memory that a dense forward pass takes beyond weights and images; ``None``
            where it was not measured.
        sparse_peak_bytes: The same, sparse.
    """

    batch_size: int
    keep_ratio: float
    counted: tokenprune.FlopReport
    speedup: Ratio
    dense_peak_bytes: int | None = None
    sparse_peak_bytes: int | None = None

    @property
    def gmac_ratio(self) -> float:
        """What multiply-adds promise."""
        return self.counted.ratio

    @property
    def kept_promise(self) -> float:
        """Speed-up ÷ GMAC ratio."""
        return self.speedup.median / self.gmac_ratio

    def fields(self) -> dict[str, Any]:
        """All figures, for JSON."""
        dense, sparse = self.speedup.medians
        return {
            "batch_size": self.batch_size,
            "keep_ratio": self.keep_ratio,
            "dense_gmacs": self.counted.dense_gmacs,
            "sparse_gmacs": self.counted.sparse_gmacs,
            "gmac_ratio": self.gmac_ratio,
            "speedup": self.speedup.median,
            "speedup_over_gmac_ratio": self.kept_promise,
            "dense_images_per_second": self.batch_size / dense,
            "sparse_images_per_second": self.batch_size / sparse,
            "dense_peak_bytes": self.dense_peak_bytes,
            "sparse_peak_bytes": self.sparse_peak_bytes,
            "dense_over_sparse": self.speedup,
        }


def compare(
    model: nn.Module,
    keep_ratios: Sequence[float],
    *,
    batch: int,
    device: str,
    dtype: str,
    rounds: int,
    compiled: bool = False,
) -> list[Speed]:
    """Time a model dense and at several keep ratios, all in turn; compiled, each by itself, or not.

    Args:
        model: A Vision Transformer of timm, in float32 on the CPU, where its multiply-adds are counted.
        keep_ratios: Each ρ.
        batch: Images a batch.
        device: Where it runs.
        dtype: Of weights and images.
        rounds: Rounds that count.
        compiled: Whether by `torch.compile`.

    Raises:
        RuntimeError: A sparse model ran dense, so that its times are worth nothing.
    """
    size = input_size(model)
    sparse: list[Any] = [tokenprune.sparsify(copy.deepcopy(model), keep_ratio=ratio).eval() for ratio in keep_ratios]
    counted = [tokenprune.flops(each, size) for each in sparse]
    runners: list[Any] = [each.eval().to(device, getattr(torch, dtype)) for each in (model, *sparse)]
    images = torch.rand(batch, *size, device=device, dtype=getattr(torch, dtype))
    if compiled:
        torch.compiler.reset()
        runners = [torch.compile(runner, dynamic=False) for runner in runners]
    calls = [partial(runner, images) for runner in runners]
    for each in sparse:
        each.tokenprune.trace = None
    with torch.no_grad():
        times = measure_rounds(calls, rounds=rounds, device=device)
        peaks = [peak_bytes(call, device) for call in calls]
    if any(each.tokenprune.trace is None for each in sparse):
        raise RuntimeError("a sparse model ran dense.")
    return [
        Speed(
            batch_size=batch,
            keep_ratio=ratio,
            counted=flops,
            speedup=Ratio(first_seconds=times[0], second_seconds=seconds),
            dense_peak_bytes=peaks[0],
            sparse_peak_bytes=peak,
        )
        for ratio, flops, seconds, peak in zip(keep_ratios, counted, times[1:], peaks[1:], strict=True)
    ]


def overhead(dense: nn.Module, images: Tensor, *, rounds: int, device: str) -> tuple[Ratio, Ratio]:
    """What hooks cost: dense ÷ a sparsified model that prunes nothing; and, as a control, dense ÷ a copy of it.

    All three share their weights, so that where these lie in memory makes no difference.
    """

    def twin() -> nn.Module:
        return copy.deepcopy(dense, {id(weight): weight for weight in dense.parameters()})

    models = (dense, tokenprune.sparsify(twin(), keep_ratio=1.0).eval(), twin())
    with torch.no_grad():
        times = measure_rounds([partial(each, images) for each in models], rounds=rounds, device=device)
    hooks, control = (Ratio(first_seconds=times[0], second_seconds=other) for other in times[1:])
    return hooks, control


class First(tokenprune.Scorer):
    """Keeps the first tokens, and costs next to nothing."""

    def forward(self, candidates: tokenprune.Candidates) -> Tensor:
        batch, number, _ = candidates.patches.shape
        return -torch.arange(number, device=candidates.patches.device).expand(batch, -1).float()


def shortened(model: nn.Module, plan: tokenprune.Plan, num_patches: int) -> nn.Module:
    """The model with its sequence cut off at the plan's stages, and nothing else: the speed-up there is to have.

    Rotary tables, which timm gives to every block as ``rope=`` (…, N, D), are cut off with it.
    """
    made: Any = copy.deepcopy(model)
    counts, kept = dict(zip(plan.stages, plan.num_keep(num_patches), strict=True)), num_patches
    for index, block in enumerate(made.blocks):
        kept = counts.get(index, kept)
        if index in counts:
            block.register_forward_pre_hook(partial(_cut_tokens, made.num_prefix_tokens + kept))
        if kept < num_patches and getattr(made, "rope", None) is not None:
            block.register_forward_pre_hook(partial(_cut_table, kept), with_kwargs=True)
    return cast(nn.Module, made)


def _cut_tokens(length: int, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0][:, :length].contiguous(), *args[1:])


def _cut_table(
    kept: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "rope": kwargs["rope"][..., :kept, :]}


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
    size, num_patches = input_size(dense), dense.patch_embed.num_patches
    rows, parts, data = [], [], []
    for batch in batch_size or [16, 1]:
        repeats = pairs if batch > 4 else 4 * pairs  # short ones scatter more
        images = torch.rand(batch, *size, device=device, dtype=getattr(torch, dtype))

        for ratio in keep_ratio or [0.9, 0.7, 0.5]:
            sparse.tokenprune.keep_ratio = free.tokenprune.keep_ratio = ratio
            counted = tokenprune.flops(sparse, size)
            models = (dense, sparse, shortened(dense, sparse.tokenprune.plan, num_patches), free)
            with torch.no_grad():
                times = measure_rounds([partial(each, images) for each in models], rounds=repeats, device=device)
            as_it_is, cut, blind = (Ratio(first_seconds=times[0], second_seconds=other) for other in times[1:])
            speed = Speed(batch_size=batch, keep_ratio=ratio, counted=counted, speedup=as_it_is)
            lower, upper = as_it_is.quartiles
            speeds = [batch / seconds for seconds in as_it_is.medians]
            rows.append(
                [
                    f"{batch}",
                    f"{ratio:g}",
                    f"{counted.dense_gmacs:.2f} → {counted.sparse_gmacs:.2f}",
                    f"{speeds[0]:.1f} → {speeds[1]:.1f}",
                    f"{counted.ratio:.2f}",
                    f"{as_it_is.median:.2f} ({lower:.2f} … {upper:.2f})",
                    f"**{speed.kept_promise:.2f}**",
                ]
            )
            parts.append(
                [f"{batch}", f"{ratio:g}", *(f"{x:.2f}" for x in (counted.ratio, cut.median, blind.median))]
                + [f"{as_it_is.median:.2f}", f"{sum(counted.stages) / counted.sparse:.1%}"]
            )
            measured = {"as_it_is": as_it_is, "cut_off": cut, "free_scorer": blind}
            data.append({"batch_size": batch, "keep_ratio": ratio, "gmac_ratio": counted.ratio, **measured})
        hooks, control = overhead(dense, images, rounds=3 * repeats, device=device)
        for what, timed in (("1", hooks), ("1, an untouched copy", control)):
            lower, upper = timed.quartiles
            told = f"{timed.median:.3f} ({lower:.3f} … {upper:.3f})"
            rows.append([f"{batch}", what, "", "", "1.00", told, f"**{timed.median:.3f}**" if timed is hooks else ""])
        data.append({"keep_ratio": 1.0, "batch_size": batch, "hooks": hooks, "untouched_copy": control})
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
