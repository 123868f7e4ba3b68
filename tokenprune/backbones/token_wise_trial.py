"""The proof that a part of a block treats tokens one by one, made in the running model.

The part is given one of the tokens that it gets, over and over between other ones that are made up, and must give for
it what it gave before. Whatever looks at several tokens, if only at their mean, then sees something else.

Shapes: B images, L tokens, K of them, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.backbones.token_wise import TokenWise, as_sequence, first_tensor, in_shape

_TOLERANCE = 1e-3
"""Of a part's output, relative to its largest magnitude, in single precision; mixed tokens differ by far more."""
_TOLERANCE_HALF = 5e-2


@dataclass
class Trial:
    """A part, while it is given some of its tokens."""

    part: TokenWise
    expected: Tensor | None
    running: bool = False
    holds: bool = False
    order: Tensor = field(default_factory=lambda: torch.empty(0))
    length: int = 0

    def install(self) -> Iterator[Any]:
        part = self.part
        yield part.first.register_forward_pre_hook(self._enter, with_kwargs=True)
        if part.mixing is not None:
            yield part.mixing[0].register_forward_hook(self._fill)
            yield part.mixing[1].register_forward_pre_hook(self._take)
        yield part.last.register_forward_hook(self._leave)

    def _view(self, tokens: Tensor) -> Tensor:
        return as_sequence(tokens, channels_first=self.part.channels_first)

    def _shaped(self, sequence: Tensor, like: Tensor) -> Tensor:
        return in_shape(sequence, like.shape, channels_first=self.part.channels_first)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tokens = args[0] if args else first_tensor(args, kwargs)
        assert isinstance(tokens, Tensor)
        self.running = True
        sequence = self._view(tokens)
        self.length = sequence.shape[1]
        generator = torch.Generator().manual_seed(self.length)
        two = torch.randperm(self.length, generator=generator)[:2]
        self.order = two.repeat(self.length // 4 + 1)[: max(1, self.length // 2)].to(tokens.device)
        some = sequence[:, self.order]
        noise = torch.randn(some[:, 1::2].shape, generator=generator).to(some)
        some[:, 1::2] = noise * 8 * sequence.std()  # a copy, by indexing
        return replace_first(args, kwargs, self._shaped(some, tokens))

    def _fill(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        hidden = self._view(output)
        assert self.expected is not None
        full = hidden.new_zeros(hidden.shape[0], self.length, hidden.shape[2]).index_copy(1, self.order, hidden)
        return self._shaped(full, self.expected)

    def _take(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return (self._shaped(self._view(args[0])[:, self.order], args[0]), *args[1:])

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, Tensor) or self.expected is None:
            raise ValueError("a part gave something else than tokens")
        given, wanted = self._view(output), self._view(self.expected)[:, self.order]
        if given.shape != wanted.shape:
            raise ValueError("a part gave another number of tokens")
        self.running = False
        # What is mixed differs where tokens are missing, so that there it is enough that it runs.
        self.holds = self.part.mixing is not None or alike(given[:, ::2], wanted[:, ::2])
        return self.expected


def alike(given: Tensor, wanted: Tensor) -> bool:
    """Whether two outputs are the same but for rounding."""
    difference = (given - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)
    return bool(difference < (_TOLERANCE if torch.finfo(given.dtype).eps < 1e-5 else _TOLERANCE_HALF))


def is_token_wise_norm(norm: nn.Module, shape: Sequence[int], *, channels_first: bool) -> bool:
    """Whether a norm treats tokens one by one, which one over groups of channels does not."""
    parameter = next(norm.parameters(), torch.empty(0))
    tokens = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0)).to(parameter)
    others = tokens.clone()
    as_sequence(others, channels_first=channels_first)[:, 1:] *= 8  # a view
    with torch.no_grad():
        given, wanted = (as_sequence(norm(one), channels_first=channels_first) for one in (others, tokens))
    return alike(given[:, :1], wanted[:, :1])


def replace_first(args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor) -> Any:
    """A module's arguments with other tokens as the first one."""
    if args:
        return (tokens, *args[1:]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: tokens}
