"""Fewer image tokens for a language model: chosen behind the projector, before the prompt is put together.

Everything behind runs the model's own code, on a prompt that has fewer places for image tokens: masks, deep features
and caches are made for it, and each token is given the position that it has in the full prompt.

Shapes: b prompts, L tokens of each as given, n of them that go on, I images, N tokens of one, C channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.backbones.vision_language import VisionLanguage
from tokenprune.errors import PromptError, StateError
from tokenprune.pruning.language.image_tokens import ImageTokens, tower_rows
from tokenprune.pruning.language.prompt import Prompt, Shortening
from tokenprune.pruning.language.pruners import Pruner, prune, pruner_name, pruner_of
from tokenprune.pruning.plan import cumulative_ratios, num_kept


@dataclass(frozen=True)
class LanguageTrace:
    """What the language model was given in the last pass with images.

    Attributes:
        indices: For each piece of the prompts that image tokens stand in, an image or a tile of one, the positions of
            those that went on, ascending, int64.
        num_tokens: N of each of them before.
        length: L, the tokens of the prompts as they were given, padding included.
        num_kept: n, the tokens that went on.
        positions: (…, b, n), the positions that they were given.
    """

    indices: tuple[Tensor, ...]
    num_tokens: tuple[int, ...]
    length: int
    num_kept: int
    positions: Tensor | None = None


class LanguagePruning(nn.Module):
    """Attached to a vision-language model as ``model.tokenprune.language``, or as ``model.tokenprune``.

    Attributes:
        described: What the model looks like.
        trace: The record of the last pass with images; ``None`` before the first one and after an unpruned one.
        enabled: Whether image tokens are pruned.
    """

    def __init__(
        self,
        described: VisionLanguage,
        keep_ratio: float | Sequence[float],
        pruner: str | Pruner,
        *,
        survival: Callable[[int], list[Tensor] | None] | None = None,
    ) -> None:
        """Describe what is pruned.

        Args:
            described: What the model looks like.
            keep_ratio: The fraction of an image's tokens that go on, in (0, 1].
            pruner: Chooses them; ``"tower"`` leaves it to the tower.
            survival: Of the side of the square of patches that an image token is made of, how long the tower has kept
                each of an image's tokens, (n,) for each row of its batch; ``None`` after a dense pass.
        """
        super().__init__()
        self.described, self.enabled = described, True
        self.trace: LanguageTrace | None = None
        self.pruner = None if pruner == "tower" else pruner_of(pruner)
        self._survival = survival
        self._keep_ratio = cumulative_ratios(keep_ratio, 1)[0]
        self._handles: list[RemovableHandle] = []
        self._restored: Any = None
        self._shortening: Shortening | None = None
        self._prompt: Prompt | None = None

    @property
    def language(self) -> LanguagePruning:
        """Itself, so that ``model.tokenprune.language`` is there with and without stages in the tower."""
        return self

    @property
    def keep_ratio(self) -> float:
        """The fraction of each image's tokens that the language model is given, in (0, 1]; it may be set.

        Raises:
            PlanError: On setting anything else.
        """
        return self._keep_ratio

    @keep_ratio.setter
    def keep_ratio(self, keep_ratio: float) -> None:
        self._keep_ratio = cumulative_ratios(keep_ratio, 1)[0]

    def num_keep(self, num_tokens: int) -> int:
        """How many of an image's tokens go on: the floor of their number times the ratio, and at least one."""
        return num_kept(num_tokens, self.keep_ratio)

    @property
    def pruner_name(self) -> str | None:
        """The name of the pruner; ``"tower"`` where the tower decides, ``None`` for one without a name."""
        return "tower" if self.pruner is None else pruner_name(self.pruner)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """While it lasts, the language model is given all image tokens."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def attach(self, model: nn.Module) -> None:
        """Become ``model.tokenprune``."""
        self.install()
        model.add_module("tokenprune", self)

    def detach(self, model: nn.Module) -> None:
        """Take everything out of ``model`` again."""
        self.uninstall()
        model._modules.pop("tokenprune", None)

    def install(self) -> None:
        """Put the hooks into the module that merges images and text."""
        merging = self.described.model
        self._handles = [
            merging.register_forward_pre_hook(self._before_model, with_kwargs=True),
            merging.register_forward_hook(self._after_model, with_kwargs=True, always_call=True),
        ]

    def uninstall(self) -> None:
        """Take the hooks out again."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.trace = [], None

    # Hooks

    def _before_model(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._prompt = self._shortening = None
        prompt = Prompt(self.described, args, kwargs)
        images = self._images(prompt.given)
        if not prompt.continues:
            self.trace = None
        if not self.enabled:
            images = False
        if not images and not prompt.continues:
            return None
        prompt.resume()
        keep = self._choose(prompt) if images else None
        if keep is None and not prompt.continues:
            return (), prompt.given
        self._shortening = prompt.shorten(keep)
        if self.trace is not None and keep is not None:
            self.trace = LanguageTrace(
                self.trace.indices,
                self.trace.num_tokens,
                prompt.length,
                prompt.given["attention_mask"].shape[1] - prompt.num_cached,
                prompt.given["position_ids"],
            )
        self._prompt = prompt
        return (), prompt.given

    def _after_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self._give_back_encoding()
        prompt, short = self._prompt, self._shortening
        self._prompt = self._shortening = None
        if prompt is None or output is None:
            return None
        prompt.remember(self._cache_of(output, prompt.given))
        return None if short is None else _restored(output, short)

    def _cache_of(self, output: Any, given: dict[str, Any]) -> Any:
        """The cache that a pass has filled; ``None`` if there is none."""
        if isinstance(output, tuple):
            filled = next((part for part in output if hasattr(part, "get_seq_length")), None)
        else:
            filled = self.described.cache_in(output)
        return self.described.cache_in(given) if filled is None else filled

    # Choosing

    def _images(self, given: dict[str, Any]) -> bool:
        encoded = given.get(self.described.encoded)
        if isinstance(encoded, dict) and encoded.get("image") is not None:
            return True
        return any(given.get(name) is not None for name in self.described.images)

    def _choose(self, prompt: Prompt) -> Tensor | None:
        """(b, L) bool, which tokens go on; ``None`` if all do. What is not needed of the images is left out."""
        encoded = self._encode(prompt.given)
        tokens = ImageTokens(encoded, self.described)
        places = prompt.placeholders()
        given, pieces = int(places.sum()), tokens.pieces(None)
        if given == sum(pieces):
            pieces = tokens.pieces(places)
        kept = [self.num_keep(number) for number in pieces]
        if given not in (sum(pieces), sum(kept)):
            raise PromptError(
                f"the prompts have {given} places for image tokens (id {self.described.placeholder}); the images give "
                f"{sum(pieces)}, of which {sum(kept)} go on at keep_ratio={self.keep_ratio}. Pass what the processor "
                "made for all of them, or places for the kept ones alone."
            )
        if kept == pieces:
            self._serve(prompt.given, encoded)
            return None
        grids = self._grids(prompt, places, pieces) if given == sum(pieces) else []
        indices = self._indices(tokens.flat, pieces, kept, grids, places)
        mask = torch.zeros(sum(pieces), dtype=torch.bool, device=tokens.flat.device)
        start = 0
        for number, chosen in zip(pieces, indices, strict=True):
            mask[start + chosen] = True
            start += number
        self.trace = LanguageTrace(tuple(indices), tuple(pieces), prompt.length, prompt.length)
        self._serve(prompt.given, tokens.keep(mask))
        if given == sum(kept):
            return None
        keep = torch.ones_like(places)
        keep[places] = mask.to(places.device)
        return keep

    def _indices(
        self,
        flat: Tensor,
        pieces: list[int],
        kept: list[int],
        grids: list[tuple[int, int] | None],
        places: Tensor,
    ) -> list[Tensor]:
        if self.pruner is None:
            return self._by_tower(pieces, kept, places)
        parts = zip_longest(flat.split(pieces), grids, kept)
        return [prune(self.pruner, part, grid, number) for part, grid, number in parts]

    def _by_tower(self, pieces: list[int], kept: list[int], places: Tensor) -> list[Tensor]:
        """Those that the tower kept longest."""
        block = self.described.block
        ranks = None if self._survival is None or block is None else self._survival(block)
        if ranks is None:
            raise StateError("the vision tower has pruned nothing; pass pruner=, such as pruner='diverse'.")
        rows = range(len(pieces)) if len(pieces) == len(ranks) else tower_rows(places, pieces, len(ranks))
        indices = []
        for row, number, k in zip(rows, pieces, kept, strict=True):
            others = number - len(ranks[row])  # a class token that is handed on as well
            if others not in (0, 1):
                raise StateError(
                    f"an image has {number} tokens behind the projector, and {len(ranks[row])} in the vision tower; "
                    "pass pruner=, such as pruner='diverse'."
                )
            rank = torch.cat([ranks[row].new_full((others,), torch.inf), ranks[row]])
            indices.append(rank.argsort(descending=True, stable=True)[:k].sort().values)
        return indices

    def _grids(self, prompt: Prompt, places: Tensor, pieces: list[int]) -> list[tuple[int, int] | None]:
        """Height and width of each piece: as positions in three dimensions tell, or of a square image."""
        positions = prompt.positions()
        if positions.dim() == 3:
            sides = positions[-2:, places].split(pieces, dim=1)  # rows and columns
            spans = [tuple(int(side.max() - side.min()) + 1 for side in piece) for piece in sides]
        else:
            spans = [(side, side) if self.described.block else (0, 0) for side in (int(n**0.5) for n in pieces)]
        return [
            (span[0], span[1]) if span[0] * span[1] == number else None
            for span, number in zip(spans, pieces, strict=True)
        ]

    # Encoding

    def _encode(self, given: dict[str, Any]) -> Any:
        """What the model makes of its images."""
        model, name = self.described.model, self.described.encode
        encoded = given.get(self.described.encoded)
        if isinstance(encoded, dict) and encoded.get("image") is not None:
            return encoded["image"]
        method = getattr(model, name)
        taken = inspect.signature(method).parameters
        arguments = {key: given[key] for key in taken if given.get(key) is not None}
        if self.described.encoded in inspect.signature(model.forward).parameters:
            arguments["return_dict"] = True
        return method(**arguments)

    def _serve(self, given: dict[str, Any], output: Any) -> None:
        """Let the model's own code find these image tokens where it would encode the images."""
        encoded = given.get(self.described.encoded)
        if isinstance(encoded, dict) and encoded.get("image") is not None:
            given[self.described.encoded] = {**encoded, "image": output}
            return
        own = self.described.model.__dict__
        self._restored = (own.get(self.described.encode),)
        own[self.described.encode] = lambda *args, **kwargs: output

    def _give_back_encoding(self) -> None:
        if self._restored is None:
            return
        own, name, (before,) = self.described.model.__dict__, self.described.encode, self._restored
        self._restored = None
        own.pop(name)
        if before is not None:
            own[name] = before


def _restored(output: Any, short: Shortening) -> Any:
    """The output of a pass with a state for each token of the prompt, (b, L, C); attention maps stay as they are."""
    if isinstance(output, tuple):
        return tuple(
            _restored_states(part, short) if number == 0 or isinstance(part, tuple) else part
            for number, part in enumerate(output)
        )
    for name in ("last_hidden_state", "hidden_states"):
        if getattr(output, name, None) is not None:
            setattr(output, name, _restored_states(getattr(output, name), short))
    return output


def _restored_states(states: Any, short: Shortening) -> Any:
    if isinstance(states, tuple):
        return tuple(_restored_states(one, short) for one in states)
    fits = isinstance(states, Tensor) and states.dim() == 3 and states.shape[:2] == short.indices.shape
    return short.restore(states) if fits else states
