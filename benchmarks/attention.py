"""What does masked attention cost beside the plain one? ``python -m benchmarks.attention``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.measuring import Device, DType, Name, Pairs, Ratio, environment, measure_pairs, report
from tokenprune.backbones.interception import AttentionCall
from tokenprune.functional import masked_attention, without_kernels
from tokenprune.pruning.size_channels import with_channels


def main(
    batch_size: Annotated[list[int] | None, typer.Option(help="Give it several times.")] = None,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 6,
    tokens: Annotated[int, typer.Option(help="Sequence length, prefix tokens included.")] = 197,
    dim: Annotated[int, typer.Option(help="Channels of a head.")] = 64,
    device: Device = "cpu",
    dtype: DType = "float32",
    pairs: Pairs = 101,
    name: Name = "attention-cpu",
) -> None:
    """Time forward and backward of masked and of plain attention in turn, half of the keys dropped.

    On CUDA also without our own kernels.
    """
    rows, data = [], []
    for batch in batch_size or [16, 1]:
        for kernels in (True, False) if device.startswith("cuda") else (True,):
            ratio = compare(batch, heads, tokens, dim, device=device, dtype=dtype, pairs=pairs, kernels=kernels)
            (masked, plain), (lower, upper) = ratio.medians, ratio.quartiles
            rows.append(
                [
                    f"{batch}" if kernels else f"{batch}, without our kernels",
                    f"{1000 * plain:.2f}",
                    f"{1000 * masked:.2f}",
                    f"**{ratio.median:.2f}** ({lower:.2f} … {upper:.2f})",
                ]
            )
            data.append({"batch_size": batch, "kernels": kernels, "masked_over_plain": ratio})
    report(
        name,
        f"Forward and backward, {heads} heads of {dim}, {tokens} tokens, medians of {pairs} pairs",
        environment(device, dtype),
        ("batch", "plain, ms", "masked, ms", "masked ÷ plain (quartiles)"),
        rows,
        data,
    )


def compare(
    batch: int, heads: int, tokens: int, dim: int, *, device: str, dtype: str, pairs: int, kernels: bool = True
) -> Ratio:
    """Masked ÷ plain attention, forward and backward, half of the keys dropped, with our own kernels or without."""
    masked, plain = runs(batch, heads, tokens, dim, device=device, dtype=dtype, kernels=kernels)
    return measure_pairs(masked, plain, pairs=pairs, device=device, repeat=1 if batch > 4 else 5)


def runs(
    batch: int, heads: int, tokens: int, dim: int, *, device: str, dtype: str, kernels: bool = True
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward and backward of masked and of plain attention, half of the keys dropped."""
    torch.manual_seed(0)
    shape = (batch, heads, tokens, dim)
    query, key, value, gradient = (torch.randn(shape, device=device, dtype=getattr(torch, dtype)) for _ in range(4))
    keep = (torch.rand(batch, tokens, device=device) < 0.5).float()
    for tensor in (query, key, value, keep):
        tensor.requires_grad_()

    def masked() -> None:
        with nullcontext() if kernels else without_kernels():
            backward(masked_attention, (query, key, value, keep), gradient)

    return masked, partial(backward, F.scaled_dot_product_attention, (query, key, value), gradient)


def compare_sizes(batch: int, heads: int, tokens: int, dim: int, *, device: str, dtype: str, pairs: int) -> Ratio:
    """Attention in proportion to sizes by two more channels ÷ by a bias, forward, as an inference with ToMe has it."""
    torch.manual_seed(0)
    shape = (3, batch, heads, tokens, dim)
    query, key, value = torch.randn(shape, device=device, dtype=getattr(torch, dtype)).unbind(0)
    log_sizes = torch.randint(1, 8, (batch, tokens), device=device).float().log()
    call = AttentionCall(query, key, value)

    @torch.no_grad()
    def channels() -> Tensor:
        return with_channels(call, log_sizes).run()[..., :dim]

    @torch.no_grad()
    def bias() -> Tensor:
        return call._replace(attn_mask=log_sizes.to(query.dtype)[:, None, None, :]).run()

    return measure_pairs(channels, bias, pairs=pairs, device=device, repeat=1 if batch > 4 else 5)


def backward(attention: Callable[..., Tensor], inputs: tuple[Tensor, ...], gradient: Tensor) -> None:
    """One forward and one backward pass."""
    torch.autograd.grad(attention(*inputs), inputs, gradient)


if __name__ == "__main__":
    typer.run(main)
