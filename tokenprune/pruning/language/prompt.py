"""A prompt that is given a language model with fewer tokens, and the cache that remembers it.

Shapes: b prompts, L tokens of each as given, n of them that go on, F tokens before these as they were given, S of them
that are in the cache, C channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenprune.backbones.vision_language import VisionLanguage
from tokenprune.errors import StateError

_REMEMBERED = "tokenprune_prompt"


class Cached(NamedTuple):
    """What a cache holds of the tokens that it was given.

    Attributes:
        mask: (b, S) int64, which of its entries are attended to.
        length: F, the tokens that they come from.
        settled: How many of its entries are up to the last token that was left out; each later one is the next token.
    """

    mask: Tensor
    length: int
    settled: int

    def cropped(self, num_entries: int) -> Cached:
        """What is left of it when only the first entries are."""
        gone = self.mask.shape[1] - num_entries
        return self._replace(mask=self.mask[:, :num_entries], length=self.length - gone)


class Shortening(NamedTuple):
    """Which tokens of a prompt go on.

    Rows of a batch are as long as the longest of them: others are filled with tokens that nobody attends to, padding of
    their own as far as there is any.

    Attributes:
        indices: (b, n) int64, their places in the prompt, ascending.
        real: (b, n) bool, which of them are no filling.
        last: (b, L) int64, for each token of the prompt the last one up to it that goes on, by its place among these;
            the first of all where there is none.
    """

    indices: Tensor
    real: Tensor
    last: Tensor

    def take(self, values: Tensor) -> Tensor:
        """Of values (b, L, …) those of the tokens that go on: (b, n, …)."""
        return values[torch.arange(len(self.indices), device=values.device).unsqueeze(1), self.indices]

    def restore(self, states: Tensor) -> Tensor:
        """Of states (b, n, C) one for each token of the prompt: (b, L, C), that of the last token up to it."""
        return states[torch.arange(len(self.last), device=states.device).unsqueeze(1), self.last]


def shortening(keep: Tensor, valid: Tensor) -> Shortening:
    """How prompts are shortened.

    Args:
        keep: (b, L) bool, which tokens are to go on.
        valid: (b, L) bool, which tokens are no padding.
    """
    real = keep & valid
    number = int(real.sum(dim=1).max())
    indices = real.long().argsort(dim=1, descending=True, stable=True)[:, :number].sort(dim=1).values  # (b, n)
    places = torch.full_like(indices.new_empty(real.shape), -1)
    places.scatter_(1, indices, torch.arange(number, device=indices.device).expand_as(indices))
    last = places.masked_fill(~real, -1).cummax(dim=1).values  # (b, L)
    first = real.gather(1, indices).long().argmax(dim=1, keepdim=True)
    return Shortening(indices, real.gather(1, indices), torch.where(last < 0, first, last))


class Prompt:
    """The arguments of a call of the module that merges images and text, by name.

    Attributes:
        given: The arguments.
        batch: b.
        length: L, the tokens of this call.
        before: F, the tokens of earlier calls, whether they went on or not.
    """

    def __init__(self, described: VisionLanguage, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._described = described
        bound = inspect.signature(described.model.forward).bind_partial(*args)
        self.given: dict[str, Any] = {**bound.arguments, **kwargs}
        tokens = self._tokens()
        self.batch, self.length = (0, 0) if tokens is None else (tokens.shape[0], tokens.shape[1])
        cache = described.cache_in(self.given)
        self._cached: Cached | None = getattr(cache, _REMEMBERED, None)
        in_cache = 0 if cache is None else int(cache.get_seq_length())
        if self._cached is not None:
            rows, entries = self._cached.mask.shape
            if rows != self.batch or not self._cached.settled <= in_cache <= entries:
                raise StateError(
                    f"the cache holds {in_cache} tokens of {self.batch} prompts, and {entries} of {rows} prompts with "
                    "fewer image tokens were put into it; it was cropped, repeated, or filled by another model. Run a "
                    "pass of its own for this prompt."
                )
            self._cached = self._cached.cropped(in_cache)  # candidates that generate has rejected
        self.before = in_cache if self._cached is None else self._cached.length
        self._settled = in_cache if self._cached is None else self._cached.settled

    @property
    def continues(self) -> bool:
        """Whether the cache holds a prompt that was shortened."""
        return self._cached is not None

    @property
    def num_cached(self) -> int:
        """S, the tokens in the cache."""
        return self.before if self._cached is None else self._cached.mask.shape[1]

    def _tokens(self) -> Tensor | None:
        tokens = self.given.get("input_ids")
        return self.given.get("inputs_embeds") if tokens is None else tokens

    def placeholders(self) -> Tensor:
        """(b, L) bool, the places of image tokens."""
        ids = self.given.get("input_ids")
        if ids is not None:
            found: Tensor = ids == self._described.placeholder
            return found
        embeddings, embed = self.given["inputs_embeds"], self._described.model.get_input_embeddings()  # type: ignore[operator]
        own = embed(torch.tensor(self._described.placeholder, device=embeddings.device))
        return torch.as_tensor(embeddings == own).all(dim=-1)

    def positions(self) -> Tensor:
        """(…, b or 1, L), the positions of the tokens, those that the model gives them where none are given."""
        given = self.given.get("position_ids")
        return self._own_positions(self.given) if given is None else given

    def _own_positions(self, given: Mapping[str, Any]) -> Tensor:
        if self._described.positions is not None:
            return self._described.positions(self._described.model, given, self.before)
        tokens = self._tokens()
        assert tokens is not None
        return torch.arange(self.before, self.before + self.length, device=tokens.device).unsqueeze(0)

    def resume(self) -> None:
        """Leave out tokens that are in the cache already.

        `generate` cuts off as many as the cache says it holds, which are fewer than it was given.

        Raises:
            StateError: The attention mask is none of all tokens, those in the cache included.
        """
        mask, expected, surplus = self._mask(), self.before + self.length, self.before - self.num_cached
        if mask is not None and mask.shape[1] == expected:
            return
        starts_early = self.length > surplus > 0 and self._starts_early(surplus)
        if mask is not None and not (starts_early and mask.shape[1] == expected - surplus):
            raise StateError(
                f"attention_mask has {mask.shape[1]} entries; expected {expected}: one for each of the {self.before} "
                f"tokens that came before, pruned ones included, and one for each of the {self.length} new ones."
            )
        if starts_early:
            for name in (*self._described.token_arguments, "inputs_embeds"):
                if isinstance(value := self.given.get(name), Tensor):
                    self.given[name] = value[:, surplus:]
            self.given["position_ids"] = self.given["position_ids"][..., surplus:]
            self.length -= surplus

    def _starts_early(self, surplus: int) -> bool:
        """Whether the given positions are those of tokens that begin so many before the new ones."""
        given = self.given.get("position_ids")
        if given is None or self._mask() is not None:
            return given is not None
        if given.dim() == 3 and given.shape[0] == 4:  # with the plain numbers of the tokens in front
            return bool((given[0, :, 0] == self.before - surplus).all())
        plain = {name: self.given.get(name) for name in ("input_ids", "inputs_embeds")}
        first = self._own_positions(plain)[..., 0]
        return bool((given[..., 0] == first - surplus).all())

    def _mask(self) -> Tensor | None:
        """The attention mask (b, F + L).

        Raises:
            StateError: It has been made for the full prompt already.
        """
        mask = self.given.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise StateError(
                "attention_mask is not one of tokens, (batch, tokens), from which the one of a shorter prompt could be "
                "made; a compiled or static cache makes one of pairs. Use the default cache."
            )
        return mask

    def valid(self) -> Tensor:
        """(b, L) bool, which tokens are no padding."""
        mask, tokens = self._mask(), self._tokens()
        assert tokens is not None
        if mask is None:
            return torch.ones(self.batch, self.length, dtype=torch.bool, device=tokens.device)
        return mask[:, self.before :].to(tokens.device, torch.bool)

    def shorten(self, keep: Tensor | None) -> Shortening | None:
        """Go on with the tokens to keep, (b, L) bool, each with its position; ``None`` means all of them."""
        positions, valid = self.positions(), self.valid()
        positions = positions.expand(*positions.shape[:-2], self.batch, -1)
        short = None
        if keep is not None:
            short = shortening(keep, valid)
            for name in (*self._described.token_arguments, "inputs_embeds"):
                if isinstance(value := self.given.get(name), Tensor):
                    self.given[name] = short.take(value)
            positions = positions.gather(-1, short.indices.expand(*positions.shape[:-1], -1))
            self._without_filling(short)
            behind = int((keep & valid).all(dim=0).flip(0).long().cumprod(0).sum())
            self._settled = self.num_cached + short.indices.shape[1] - behind
            valid = short.real
        mask = valid.long()
        before = self._entries_before(mask)
        if (places := self.given.get("cache_position")) is not None:
            self.given["cache_position"] = before.shape[1] + torch.arange(mask.shape[1], device=places.device)
        self.given["position_ids"] = positions
        self.given["attention_mask"] = torch.cat([before, mask], dim=1)
        return short

    def _without_filling(self, short: Shortening) -> None:
        """Let no token that fills a row be one for which an image token is expected."""
        ids = self.given.get("input_ids")
        if ids is not None:
            other = int(self._described.placeholder == 0)
            self.given["input_ids"] = ids.masked_fill(~short.real & (ids == self._described.placeholder), other)
        else:
            self.given["inputs_embeds"] = self.given["inputs_embeds"].masked_fill(~short.real.unsqueeze(-1), 0)

    def _entries_before(self, mask: Tensor) -> Tensor:
        """(b, S), which entries of the cache are attended to."""
        if self._cached is not None:
            return self._cached.mask.to(mask.device)
        given = self._mask()
        return mask.new_ones(self.batch, self.before) if given is None else given[:, : self.before].to(mask)

    def remember(self, cache: Any) -> None:
        """Note in the cache that went along what it holds now."""
        if cache is not None:
            setattr(cache, _REMEMBERED, Cached(self.given["attention_mask"], self.before + self.length, self._settled))
