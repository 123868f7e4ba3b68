"""Finding the parts of blocks that treat tokens one by one, and proving that they do.

Candidates are pairs of linear layers, or of 1 × 1 convolutions, that a block calls one after the other, from the width
of its tokens to a larger one and back. The proof is made in the running model: each part is given one of the tokens
that it gets, over and over between other ones that are made up, and must give for it what it gave before. Whatever
looks at several tokens, if only at their mean, then sees something else.

Shapes: B images, L tokens, K of them, C channels.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tokenprune.backbones.probing import eval_mode
from tokenprune.backbones.token_wise import TokenWise, as_sequence, first_tensor, in_shape
from tokenprune.errors import UnsupportedModelError
from tokenprune.tokens import output_tokens

_TOLERANCE = 1e-3
"""Of a part's output, relative to its largest magnitude, in single precision; mixed tokens differ by far more."""
_TOLERANCE_HALF = 5e-2


class FoundPart(NamedTuple):
    """A part that was found in a block.

    Attributes:
        part: The part.
        shape: Of its input when it was found.
        cost: Its multiply-adds then.
    """

    part: TokenWise
    shape: tuple[int, ...]
    cost: int


@dataclass
class Call:
    """How a module was called.

    Attributes:
        shape: Of its first tensor.
        output: What it returned, where that may be a part's output.
        output_shape: Of its output; ``()`` if that is no tensor.
        norm: The norm whose output it was given, if it was.
        number: When it was called, among all calls.
        times: How often.
    """

    shape: tuple[int, ...]
    number: int
    norm: nn.Module | None = None
    output: Tensor | None = None
    output_shape: tuple[int, ...] = ()
    times: int = 1


@dataclass
class Recording:
    """All calls of one run.

    Attributes:
        calls: How each module was called.
        names: The modules' names.
    """

    calls: dict[nn.Module, Call]
    names: dict[nn.Module, str]

    def inside(self, block: nn.Module) -> list[nn.Module]:
        """The modules inside a block that were called once, in that order."""
        called = [module for module in block.modules() if module in self.calls and self.calls[module].times == 1]
        return sorted(called, key=lambda module: self.calls[module].number)


def linear_widths(module: nn.Module) -> tuple[int, int] | None:
    """Channels that a linear layer, or a 1 × 1 convolution, takes and gives; ``None`` of any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv2d) and module.groups == 1 and module.stride == (1, 1):
        return (module.in_channels, module.out_channels) if module.kernel_size == (1, 1) else None
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2:  # a transposed linear
        return weight.shape[0], weight.shape[1]
    return None


class Probe:
    """Runs a model, and finds and proves its token-wise parts.

    Args:
        model: The model, or the part of it that runs the blocks.
        inputs: Keyword arguments of its forward pass, or positional ones.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any]) -> None:
        self.model, self.inputs = model, inputs
        self._silent = {
            name: torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).to(parameter) * 0.1
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point() and not bool(parameter.detach().any())
        }

    def run(self) -> None:
        """One pass; parameters that are all zero, behind which something could hide, have other values in it.

        Raises:
            UnsupportedModelError: The model could not be run.
        """
        args, kwargs = ((), dict(self.inputs)) if isinstance(self.inputs, Mapping) else (tuple(self.inputs), {})
        devices = [parameter.device for parameter in self.model.parameters() if parameter.device.type == "cuda"][:1]
        try:
            with eval_mode(self.model), torch.random.fork_rng(devices=devices), torch.no_grad():
                functional_call(self.model, self._silent, args, kwargs)
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} could not be run on example images to see what it looks like "
                f"({type(error).__name__}: {error})."
            ) from error

    def record(self) -> Recording:
        """Run the model and note how its modules are called."""
        names = {module: name for name, module in self.model.named_modules()}
        calls: dict[nn.Module, Call] = {}
        last: list[tuple[nn.Module, weakref.ref[Tensor]]] = []
        holders = {
            module
            for module in names
            if sum(linear_widths(one) is not None for one in module.modules()) in (2, 3)  # a gated MLP has three
        }

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = first_tensor(args, kwargs)
            if module in calls:
                calls[module].times += 1
                return
            norm = last[-1][0] if last and tokens is not None and last[-1][1]() is tokens else None
            calls[module] = Call(() if tokens is None else tuple(tokens.shape), len(calls), norm)

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            tokens = None if isinstance(output, tuple) and not output else output_tokens(output)
            if not isinstance(tokens, Tensor):
                return
            call, widths = calls[module], linear_widths(module)
            call.output_shape = tuple(tokens.shape)
            # Outputs that may be a part's are kept: of a layer back to fewer channels, and of what holds such layers.
            if (widths is not None and widths[0] > widths[1]) or (
                module in holders and call.output_shape == call.shape
            ):
                call.output = tokens
            if "norm" in type(module).__name__.lower():
                last[:] = [(module, weakref.ref(tokens))]

        with ExitStack() as hooks:
            for module in self.model.modules():
                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
            self.run()
        return Recording(calls, names)

    def parts(self, blocks: Sequence[nn.Module], recording: Recording) -> dict[nn.Module, list[FoundPart]]:
        """The token-wise parts of each of several blocks, in the order in which they run."""
        open_pairs = {
            (block, number): candidates
            for block in blocks
            for number, candidates in enumerate(_candidates(block, recording))
        }
        found: dict[tuple[nn.Module, int], FoundPart] = {}
        while open_pairs:
            tried = {key: candidates[0] for key, candidates in open_pairs.items()}
            proved = self._prove(tried, recording)
            found |= {key: tried[key] for key in proved}
            open_pairs = {
                key: candidates[1:] for key, candidates in open_pairs.items() if key not in found and candidates[1:]
            }
        return {block: [found[key] for key in sorted_keys(found, block)] for block in blocks}

    def _prove(
        self, tried: Mapping[tuple[nn.Module, int], FoundPart], recording: Recording
    ) -> set[tuple[nn.Module, int]]:
        """Which of several parts, no two of which overlap, treat tokens one by one."""
        left = dict(tried)
        failures: Counter[tuple[type, ...]] = Counter()
        while left:
            trials = {key: _Trial(one.part, recording.calls[one.part.last].output) for key, one in left.items()}
            try:
                with ExitStack() as hooks:
                    for trial in trials.values():
                        for handle in trial.install():
                            hooks.callback(handle.remove)
                    self.run()
            except UnsupportedModelError:
                # The one that was running is none, nor are others of its kind where it is the second one.
                running = [key for key, trial in trials.items() if trial.running]
                if not running:
                    raise
                kinds = {key: (type(key[0]), *map(type, left[key].part.modules)) for key in left}
                failures.update(kinds[key] for key in running)
                left = {key: left[key] for key in left if key not in running and failures[kinds[key]] < 2}
                continue
            return {key for key, trial in trials.items() if trial.holds}
        return set()


def sorted_keys(found: Mapping[tuple[nn.Module, int], FoundPart], block: nn.Module) -> list[tuple[nn.Module, int]]:
    """The keys of one block's parts, in order."""
    return sorted((key for key in found if key[0] is block), key=lambda key: key[1])


@dataclass
class _Trial:
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
        self.holds = self.part.mixing is not None or _alike(given[:, ::2], wanted[:, ::2])
        return self.expected


def _alike(given: Tensor, wanted: Tensor) -> bool:
    difference = (given - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)
    return bool(difference < (_TOLERANCE if torch.finfo(given.dtype).eps < 1e-5 else _TOLERANCE_HALF))


def _is_token_wise_norm(norm: nn.Module, shape: Sequence[int], *, channels_first: bool) -> bool:
    """Whether a norm treats tokens one by one, which one over groups of channels does not."""
    parameter = next(norm.parameters(), torch.empty(0))
    tokens = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0)).to(parameter)
    others = tokens.clone()
    as_sequence(others, channels_first=channels_first)[:, 1:] *= 8  # a view
    with torch.no_grad():
        given, wanted = (as_sequence(norm(one), channels_first=channels_first) for one in (others, tokens))
    return _alike(given[:, :1], wanted[:, :1])


def replace_first(args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor) -> Any:
    """A module's arguments with other tokens as the first one."""
    if args:
        return (tokens, *args[1:]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: tokens}


def has_candidates(block: nn.Module, recording: Recording) -> bool:
    """Whether a block calls two linear layers that may be a part."""
    return bool(_candidates(block, recording))


def _candidates(block: nn.Module, recording: Recording) -> list[list[FoundPart]]:
    """For each pair of linear layers in a block that may be a part: the forms it may have, the best first."""
    called = recording.inside(block)
    linear = [module for module in called if linear_widths(module) is not None]
    found = []
    for before, after in pairwise(linear):
        pair = _pair(before, after, recording)
        if pair is not None:
            found.append(list(_forms(block, pair, before, after, called, recording)))
    return [forms for forms in found if forms]


def _pair(before: nn.Module, after: nn.Module, recording: Recording) -> FoundPart | None:
    """Two layers as a part, if their widths and shapes are those of one."""
    first, last = recording.calls[before], recording.calls[after]
    (width, hidden), (back, out) = linear_widths(before) or (0, 0), linear_widths(after) or (0, 0)
    shapes = (first.shape, first.output_shape, last.shape, last.output_shape)
    if (
        width != out
        or hidden <= width
        or hidden not in (back, 2 * back)
        or any(len(one) not in (3, 4) for one in shapes)
    ):
        return None
    channels_first = isinstance(before, nn.Conv2d)
    if channels_first != isinstance(after, nn.Conv2d) or first.shape != last.output_shape:
        return None
    num_tokens = torch.Size(first.shape).numel() // width
    cost = num_tokens * (width * hidden + back * out)
    part = TokenWise(first=before, last=after, embed_dim=width, channels_first=channels_first)
    return FoundPart(part, first.shape, cost)


def _forms(
    block: nn.Module,
    pair: FoundPart,
    before: nn.Module,
    after: nn.Module,
    called: list[nn.Module],
    recording: Recording,
) -> Iterator[FoundPart]:
    """A pair as the whole module that it is in, or by itself, each with the norm in front of it or without."""
    names, calls = recording.names, recording.calls
    start, end = calls[before].number, calls[after].number
    between = [module for module in called if start < calls[module].number < end and not any(module.children())]
    mixes = any(_may_mix(module) for module in between)
    whole = _common(block, before, after, recording)
    forms = [] if mixes else [pair.part] if whole is None else [replace(pair.part, first=whole, last=whole), pair.part]
    for form in forms:
        norm = calls[form.first].norm
        inside = norm is not None and names[norm].startswith(f"{names[block]}." if names[block] else "")
        if norm is not None and inside and calls[norm].times == 1:
            yield pair._replace(part=replace(form, first=norm))
        yield pair._replace(part=form)
    if mixes:
        mixed = replace(pair.part, mixing=(before, after))
        norm = calls[before].norm or (None if whole is None else calls[whole].norm)
        if norm in called and _is_token_wise_norm(norm, pair.shape, channels_first=mixed.channels_first):
            yield pair._replace(part=replace(mixed, first=norm))
        yield pair._replace(part=mixed)


def _may_mix(module: nn.Module) -> bool:
    """Whether a module between the two linear layers has weights that may see more than one token at a time."""
    has_weights = next(module.parameters(recurse=False), None) is not None
    return has_weights and "norm" not in type(module).__name__.lower().replace("responsenorm", "")


def _common(block: nn.Module, before: nn.Module, after: nn.Module, recording: Recording) -> nn.Module | None:
    """The smallest module inside a block that holds both layers, if it takes and gives what these do."""
    names, calls = recording.names, recording.calls
    holding = [
        module
        for module in recording.inside(block)
        if module is not block and all(names[one].startswith(f"{names[module]}.") for one in (before, after))
    ]
    if not holding:
        return None
    smallest = max(holding, key=lambda module: len(names[module]))
    fits = calls[smallest].shape == calls[before].shape and calls[smallest].output_shape == calls[after].output_shape
    return smallest if fits else None
