"""What reading a prompt costs a vision-language model, dense and sparse: multiply-adds by part, cache, and seconds.

One multiply-add counts 1. Attention counts with every pair of tokens, masked ones included, as it is computed.
"""

from __future__ import annotations

import inspect
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tokenprune.api import attached_to, dense, language_of, unwrap
from tokenprune.backbones.probing import eval_mode
from tokenprune.errors import StateError
from tokenprune.pruning.language import LanguagePruning, pruner_of

if TYPE_CHECKING:
    from rich.table import Table

PARTS = ("tower", "projector", "language model", "head")


@dataclass(frozen=True, kw_only=True)
class PrefillReport:
    """Multiply-adds of one pass over a batch of prompts with images, as `generate` begins, unpruned and pruned.

    Attributes:
        keep_ratio: The fraction of each image's tokens that the language model is given.
        num_prompts: Prompts in the batch.
        image_tokens: Image tokens in all prompts, unpruned and pruned.
        prompt_tokens: Length of the prompts, padding included, unpruned and pruned.
        dense: Multiply-adds by part, unpruned: the vision tower; the projector, with all else that makes image tokens
            and merges them; the language model; the head on each prompt's last token.
        sparse: The same, pruned, with stages and pruner.
        cache_bytes: Size of the cache behind the pass, unpruned and pruned.
    """

    keep_ratio: float
    num_prompts: int
    image_tokens: tuple[int, int]
    prompt_tokens: tuple[int, int]
    dense: dict[str, int]
    sparse: dict[str, int]
    cache_bytes: tuple[int, int]

    @property
    def dense_gmacs(self) -> float:
        """Multiply-adds without pruning, in 10⁹."""
        return sum(self.dense.values()) / 1e9

    @property
    def sparse_gmacs(self) -> float:
        """Multiply-adds with pruning, in 10⁹."""
        return sum(self.sparse.values()) / 1e9

    @property
    def ratio(self) -> float:
        """Dense ÷ sparse: the speed-up to expect."""
        return self.dense_gmacs / self.sparse_gmacs

    def to_json(self) -> str:
        """All attributes, and the figures derived from them, as a JSON object."""
        derived = {"dense_gmacs": self.dense_gmacs, "sparse_gmacs": self.sparse_gmacs, "ratio": self.ratio}
        return json.dumps({**asdict(self), **derived})

    def table(self) -> Table:
        """The report as a rich table."""
        from rich.table import Table

        table = Table(
            title=f"Reading {self.num_prompts} prompts with images, {self.keep_ratio:.1%} of image tokens left"
        )
        for column in ("part", "dense", "sparse", "dense ÷ sparse"):
            table.add_column(column, justify="left" if column == "part" else "right")

        def row(name: str, before: float, after: float, unit: str) -> None:
            table.add_row(name, f"{before:,.3f}{unit}", f"{after:,.3f}{unit}", f"{before / after:.2f}" if after else "")

        for part in PARTS:
            row(part, self.dense[part] / 1e9, self.sparse[part] / 1e9, " GMACs")
        table.add_section()
        row("all", self.dense_gmacs, self.sparse_gmacs, " GMACs")
        row("cache", self.cache_bytes[0] / 2**20, self.cache_bytes[1] / 2**20, " MiB")
        for name, numbers in (("image tokens", self.image_tokens), ("prompt tokens", self.prompt_tokens)):
            table.add_row(name, *map(str, numbers), f"{numbers[0] / numbers[1]:.2f}")
        return table

    def __str__(self) -> str:
        return (
            f"{self.dense_gmacs:.2f} GMACs dense, {self.sparse_gmacs:.2f} sparse, ratio {self.ratio:.2f}; "
            f"{self.image_tokens[0]} → {self.image_tokens[1]} image tokens"
        )


@dataclass(frozen=True, kw_only=True)
class PrefillTimes:
    """Seconds of one pass over a batch of prompts with images, unpruned, with random tokens, and with the pruner's.

    Attributes:
        pruner: Name of the pruner; ``None`` for one without a name.
        keep_ratio: The fraction of each image's tokens that the language model is given.
        dense_seconds: Of each unpruned pass.
        random_seconds: Of the pass beside it in which the language model is given as many tokens chosen at random.
        sparse_seconds: Of the pass beside it with the pruner.
    """

    pruner: str | None
    keep_ratio: float
    dense_seconds: tuple[float, ...]
    random_seconds: tuple[float, ...]
    sparse_seconds: tuple[float, ...]

    def speedups(self, *, random: bool = False) -> tuple[float, ...]:
        """Dense ÷ pruned seconds of each round, with the pruner or with random tokens."""
        after = self.random_seconds if random else self.sparse_seconds
        return tuple(before / pruned for before, pruned in zip(self.dense_seconds, after, strict=True))

    @property
    def speedup(self) -> float:
        """Median over the rounds with the pruner."""
        return statistics.median(self.speedups())

    @property
    def random_speedup(self) -> float:
        """Median over the rounds with random tokens."""
        return statistics.median(self.speedups(random=True))

    def spread(self, *, random: bool = False) -> tuple[float, float]:
        """The rounds' speed-ups at the lower and the upper quartile."""
        lower, _, upper = statistics.quantiles(self.speedups(random=random), n=4)
        return lower, upper

    def to_json(self) -> str:
        """All attributes, and the figures derived from them, as a JSON object."""
        derived = {
            "speedup": self.speedup,
            "spread": self.spread(),
            "random_speedup": self.random_speedup,
            "random_spread": self.spread(random=True),
        }
        return json.dumps({**asdict(self), **derived})

    def __str__(self) -> str:
        def one(name: str | None, speedup: float, spread: tuple[float, float]) -> str:
            return f"{name or 'pruner'} {speedup:.2f} (quartiles {spread[0]:.2f} … {spread[1]:.2f})"

        random = one("random", self.random_speedup, self.spread(random=True))
        return f"speed-up of the prefill: {one(self.pruner, self.speedup, self.spread())}, {random}"


def prefill_flops(model: nn.Module, inputs: Mapping[str, Any]) -> PrefillReport:
    """Count the multiply-adds of a vision-language model's first pass over prompts with images, by part.

    Args:
        model: A sparsified vision-language model; its mode, weights and settings are left as they are.
        inputs: What its processor makes of images and prompts, with places for all image tokens.

    Raises:
        StateError: The model is not sparsified, or no vision-language model.
    """
    language = _language(model)
    with eval_mode(unwrap(model)), _inference(model), torch.no_grad():
        with dense(model):
            before, cache_before = _count(model, inputs, language)
        after, cache_after = _count(model, inputs, language)
    length = _prompt(inputs).shape[:2]
    trace = language.trace
    places = sum(trace.num_tokens) if trace else int((inputs["input_ids"] == language.described.placeholder).sum())
    kept = sum(map(len, trace.indices)) if trace else places
    return PrefillReport(
        keep_ratio=language.keep_ratio,
        num_prompts=length[0],
        image_tokens=(places, kept),
        prompt_tokens=(length[1], trace.num_kept if trace else length[1]),
        dense=before,
        sparse=after,
        cache_bytes=(cache_before, cache_after),
    )


def prefill_times(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    pairs: int = 15,
    warmup: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> PrefillTimes:
    """Time a vision-language model's first pass over prompts with images: dense, random and pruned in turn.

    Every other round runs backwards, so that what comes first gains or loses nothing by it.

    Args:
        model: A sparsified vision-language model, on its device and in its dtype; its settings are left as they are.
        inputs: What its processor makes of images and prompts.
        pairs: Rounds that are counted.
        warmup: Rounds that run before and are not counted.
        progress: Called after each round with the number of rounds done and of all.

    Raises:
        StateError: The model is not sparsified, or no vision-language model.
        ValueError: There are fewer than two rounds, too few for a spread, or ``warmup`` is negative.
    """
    if pairs < 2 or warmup < 0:
        raise ValueError(f"pairs={pairs}, warmup={warmup}: at least 2 pairs for a spread, and a number from 0.")
    language = _language(model)
    ways: dict[str, Callable[[], Any]] = {
        "dense": lambda: dense(model),
        "random": lambda: _pruner(language, pruner_of("random")),
        "sparse": nullcontext,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with eval_mode(unwrap(model)), _inference(model), torch.no_grad():
        for number in range(-warmup, pairs):
            for name in reversed(ways) if number % 2 else ways:
                with ways[name]():
                    taken = _seconds(model, inputs)
                if number >= 0:
                    seconds[name].append(taken)
            if progress is not None:
                progress(number + warmup + 1, pairs + warmup)
    return PrefillTimes(
        pruner=language.pruner_name,
        keep_ratio=language.keep_ratio,
        dense_seconds=tuple(seconds["dense"]),
        random_seconds=tuple(seconds["random"]),
        sparse_seconds=tuple(seconds["sparse"]),
    )


def _language(model: nn.Module) -> LanguagePruning:
    found = language_of(model)
    if found is None:
        raise StateError(
            f"{type(unwrap(model)).__name__} reads no prompts that an adapter knows of; use tokenprune.flops and "
            "tokenprune.throughput."
        )
    return found


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """In the execution of inference, with the plan's numbers of tokens, where the tower has stages."""
    attached = attached_to(model)
    if isinstance(attached, LanguagePruning):
        yield
        return
    with attached.budgeting("fixed"), attached.executing(attached.inference_execution):
        yield


@contextmanager
def _pruner(language: LanguagePruning, pruner: Any) -> Iterator[None]:
    before, language.pruner = language.pruner, pruner
    try:
        yield
    finally:
        language.pruner = before


def _prompt(inputs: Mapping[str, Any]) -> Tensor:
    tokens: Tensor = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    return tokens


def _run(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The pass with which `generate` begins: its head sees the last token alone."""
    taken = inspect.signature(unwrap(model).forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
    return model(**inputs, **last, use_cache=True)


def _seconds(model: nn.Module, inputs: Mapping[str, Any]) -> float:
    device = _prompt(inputs).device
    _synchronize(device)
    start = time.perf_counter()
    _run(model, inputs)
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _attention_on_cpu(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)  # type: ignore[no-any-return]


def _count(model: nn.Module, inputs: Mapping[str, Any], language: LanguagePruning) -> tuple[dict[str, int], int]:
    """Multiply-adds by part, and the bytes of the cache."""
    described, inner = language.described, unwrap(model)
    # PyTorch counts the attention of accelerators, and not that of a CPU.
    own = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        output = _run(model, inputs)
    counts = counter.get_flop_counts()
    prefix, names = type(inner).__name__, {module: name for name, module in inner.named_modules()}

    def of(module: nn.Module) -> int:
        name = names[module]
        return int(sum(counts[f"{prefix}.{name}" if name else prefix].values())) // 2

    everything = counter.get_total_flops() // 2
    merged, tower, words = of(described.model), of(described.tower), of(described.language)
    parts = (tower, merged - tower - words, words, everything - merged)
    return dict(zip(PARTS, parts, strict=True)), _bytes(described.cache_in(output))


def _bytes(cache: Any) -> int:
    tensors = {
        id(value): value
        for layer in cache.layers
        for value in vars(layer).values()
        if isinstance(value, Tensor) and value.dim() == 4
    }
    return sum(value.numel() * value.element_size() for value in tensors.values())
