"""Sequences of tokens: where the patch tokens are in them, and removing and restoring tokens.

Shapes: B images, P prefix tokens, N patch tokens, n of them left, S summary tokens, Q suffix tokens,
L = P + N + S + Q, K = P + n + S + Q, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tokenprune.errors import StateError


def sizes(tensor: Tensor) -> Sequence[int]:
    """The shape in plain numbers, also while TorchScript traces a model, where sizes are tensors."""
    return [int(size) for size in tensor.shape] if _is_tracing() else tensor.shape


def becomes_code() -> bool:
    """Whether a compiler, an exporter or TorchScript makes code of a pass, so that its tensors belong to it alone."""
    return torch.compiler.is_compiling() or _is_tracing()


def _is_tracing() -> bool:
    return torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call, no-any-return]


_Tuple = TypeVar("_Tuple", bound=tuple[Any, ...])


def replaced(values: _Tuple, changes: Mapping[str, Any]) -> _Tuple:
    """A named tuple with other entries."""
    if not torch.compiler.is_compiling():  # torch.compile of torch 2.11 cannot put what this gives into an attribute
        return values._replace(**changes)  # type: ignore[attr-defined, no-any-return]
    fields: tuple[str, ...] = values._fields  # type: ignore[attr-defined]
    return type(values)(*[changes.get(name, value) for name, value in zip(fields, values, strict=True)])


class Layout(NamedTuple):
    """How many tokens of which kind a sequence has, in their order.

    Attributes:
        num_prefix: P, class, distillation and register tokens, those that join between two blocks included.
        num_patches: The patch tokens in the sequence: N, or n where the others were removed.
        num_summary: S, what reductions have made of pruned tokens.
        num_suffix: Q, such as detection tokens.
    """

    num_prefix: int
    num_patches: int
    num_summary: int = 0
    num_suffix: int = 0

    def replace(self, **changes: int) -> Layout:
        """A layout with other numbers."""
        return replaced(self, changes)

    @property
    def length(self) -> int:
        """L."""
        return sum(self)

    @property
    def _end(self) -> int:
        """Where the patch tokens end."""
        return self.num_prefix + self.num_patches

    def prefix(self, tokens: Tensor) -> Tensor:
        """The prefix tokens (B, P, C) of a sequence (B, L, C)."""
        return tokens[:, : self.num_prefix]

    def patches(self, tokens: Tensor) -> Tensor:
        """The patch tokens (B, N, C) of a sequence (B, L, C)."""
        return tokens[:, self.num_prefix : self._end]

    def summaries(self, tokens: Tensor) -> Tensor:
        """The summary tokens (B, S, C) of a sequence (B, L, C)."""
        return tokens[:, self._end : self._end + self.num_summary]

    def with_patches(self, tokens: Tensor, patches: Tensor) -> Tensor:
        """A sequence (B, L, C) with other patch tokens, as many or not: (B, n, C)."""
        return torch.cat([self.prefix(tokens), patches, tokens[:, self._end :]], dim=1)

    def with_summaries(self, tokens: Tensor, summaries: Tensor) -> Tensor:
        """A sequence (B, L, C) with further summary tokens (B, s, C), behind those that it has."""
        end = self._end + self.num_summary
        return torch.cat([tokens[:, :end], summaries, tokens[:, end:]], dim=1)

    def without_summaries(self, tokens: Tensor) -> Tensor:
        """A sequence (B, L, C) without its summary tokens."""
        if not self.num_summary:
            return tokens
        return torch.cat([tokens[:, : self._end], tokens[:, self._end + self.num_summary :]], dim=1)

    def positions(self, indices: Tensor) -> Tensor:
        """Patch indices (B, n) as positions in the sequence, with those of all other tokens: (B, K)."""
        everything = torch.arange(self.length, device=indices.device).expand(indices.shape[0], -1)
        parts = [everything[:, : self.num_prefix], indices + self.num_prefix]
        if self.num_summary or self.num_suffix:
            parts.append(everything[:, self._end :])
        return torch.cat(parts, dim=1)

    def with_others(self, keep: Tensor, summaries: Tensor | None = None) -> Tensor:
        """Decisions on patches (B, N) as decisions on all tokens (B, L).

        The others are kept, but for summary tokens that hold nothing: (B, S), 0 = nothing; ``None`` means all
        hold something.
        """
        batch = keep.shape[0]
        parts = [keep.new_ones(batch, self.num_prefix), keep]
        if self.num_summary:
            parts.append(keep.new_ones(batch, self.num_summary) if summaries is None else summaries)
        if self.num_suffix:
            parts.append(keep.new_ones(batch, self.num_suffix))
        return torch.cat(parts, dim=1)


def of_length(layouts: Sequence[Layout], length: int) -> Layout | None:
    """The first of several layouts that has so many tokens; ``None`` if none has."""
    return next((layout for layout in layouts if layout.length == length), None)


def select(tokens: Tensor, positions: Tensor) -> Tensor:
    """The tokens (B, K, C) at each image's own positions (B, K), of tokens (B, L, C)."""
    # Whole rows of one long sequence are copied several times as fast as torch.gather picks numbers.
    flat = rows(positions, tokens.shape[1])
    return tokens.flatten(0, 1).index_select(0, flat).view(*positions.shape, sizes(tokens)[2])


def restore(tokens: Tensor, positions: Tensor, everything: Tensor) -> Tensor:
    """All tokens ``everything`` (B, L, C), with ``tokens`` (B, K, C) in place of those at ``positions`` (B, K)."""
    flat = rows(positions, everything.shape[1])
    return everything.flatten(0, 1).index_copy(0, flat, tokens.flatten(0, 1)).view_as(everything)


def rows(positions: Tensor, length: int) -> Tensor:
    """Positions (B, K) in sequences of L tokens as rows (B·K) of all of them in one."""
    batch = positions.shape[0]
    return (positions + length * torch.arange(batch, device=positions.device).unsqueeze(1)).flatten()


def find_tokens(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, packed: bool = False) -> Tensor:
    """The tokens (B, L, C) among the arguments of a block: the first one, or the first tensor by name.

    Those of all images in one sequence (T, C), where the model packs them, are seen as (1, T, C).

    Raises:
        StateError: There are none of that shape.
    """
    tokens = args[0] if args else next((value for value in kwargs.values() if isinstance(value, Tensor)), None)
    if packed and isinstance(tokens, Tensor) and tokens.dim() == 2:
        return tokens.unsqueeze(0)
    if not isinstance(tokens, Tensor) or tokens.dim() != 3:
        got = f"shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise StateError(f"{type(block).__name__} got {got} where tokens of shape (B, L, C) were expected.")
    return tokens


def replace_tokens(
    args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block with other tokens (B, K, C)."""
    if args:
        return (_as_before(args[0], tokens), *args[1:]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: _as_before(kwargs[name], tokens)}


def output_tokens(output: Any) -> Tensor:
    """The tokens (B, K, C) in what a block returned: all of it, or the first item of a tuple."""
    tokens: Tensor = output[0] if isinstance(output, tuple) else output
    return tokens.unsqueeze(0) if tokens.dim() == 2 else tokens


def replace_output_tokens(output: Any, tokens: Tensor) -> Any:
    """What a block returned, with other tokens."""
    if isinstance(output, tuple):
        return (_as_before(output[0], tokens), *output[1:])
    return _as_before(output, tokens)


def _as_before(before: Tensor, tokens: Tensor) -> Tensor:
    """Tokens (B, K, C), or (K, C) where those before had no dimension for images."""
    return tokens.squeeze(0) if before.dim() == 2 else tokens
