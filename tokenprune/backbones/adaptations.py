"""Adaptations: what a family of models needs beyond a plain description.

An adaptation is a small object in a `Backbone`. It says how its family differs and installs its own hooks, so that
nothing else has to know about it. Those here serve several families; the others are in the adapters.

Shapes: B images, n patch tokens that are left, L tokens before any pruning, K tokens of the sequence as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.backbones.interception import AttentionCall, Interception
from tokenprune.backbones.patterns import gather_mask, gather_tokens
from tokenprune.errors import StateError, UnsupportedModelError
from tokenprune.tokens import Layout, sizes


class Removed(NamedTuple):
    """What is left of a sequence of which tokens have been removed.

    Attributes:
        positions: (B, K) int64, those left among all tokens.
        length: L.
        gathered: Side inputs of the block that have been gathered already, each image's own.
    """

    positions: Tensor
    length: int
    gathered: tuple[Tensor, ...]


class RunningModel(Protocol):
    """What an adaptation may ask of a sparsified model while it runs."""

    def kept_indices(self, block: int) -> Tensor | None:
        """(B, n) int64, the positions in the grid of the patch tokens that block ``block`` gets; ``None`` if all."""
        ...

    def full_length(self) -> int | None:
        """L, where tokens are removed in this pass; ``None`` where all stay."""
        ...

    def mask_weights(self, weights: Tensor) -> Tensor | None:
        """Finished attention weights (B, K, K, H) with those of pruned tokens at 0; ``None`` where all are seen."""
        ...

    def drops(self) -> bool:
        """Whether tokens are missing behind a block, since nothing restores them."""
        ...


class Scope(Protocol):
    """Something that is switched on in front of a module and off again behind it."""

    def enter(self) -> None:
        """Switch it on."""
        ...

    def leave(self) -> None:
        """Switch it off."""
        ...

    def check(self, module: nn.Module) -> None:
        """Raise an error if the module that has run did not do what was expected."""
        ...


class Adaptation:
    """What a family of models needs; a subclass overrides what differs.

    Attributes:
        summary_obstacle: Why a token that stands for several others has no place in such a model; ``None`` if nothing
            speaks against it.
        packing_obstacle: Why the tokens of several images cannot be given to a block as one sequence, with attention
            split by image; ``None`` if nothing speaks against it.
        mixes_weights: Whether attention weights are changed after the softmax, so that they do not say what a token
            receives.
    """

    summary_obstacle: str | None = None
    packing_obstacle: str | None = None
    mixes_weights: bool = False

    def modules(self) -> Iterable[nn.Module]:
        """The modules that it names, which must be parts of the model."""
        return ()

    def check(self, model: nn.Module, *, restores: bool) -> None:
        """Refuse a model that it does not fit, or one whose pruned tokens are not restored, where they must be.

        Raises:
            UnsupportedModelError: The message says why.
        """

    def apply(self) -> None:
        """Change what must be changed on the model while it is sparsified."""

    def undo(self) -> None:
        """Undo what `apply` has changed."""

    def install_outside(self, blocks: Sequence[nn.Module], running: RunningModel) -> Iterator[RemovableHandle]:
        """Install hooks that see a block's arguments before, and its output after, tokens are pruned or restored."""
        yield from ()

    def install_inside(self, blocks: Sequence[nn.Module], running: RunningModel) -> Iterator[RemovableHandle]:
        """Install hooks that see what a block itself gets, after tokens were pruned, and gives."""
        yield from ()

    def num_late_prefix(self, block: int) -> int:
        """How many prefix tokens have joined in front by block ``block``, besides those in front of the first one."""
        return 0

    def attention_layouts(self, layout: Layout) -> tuple[Layout, ...]:
        """Sequences over which a block attends instead of its own, of that layout."""
        return ()

    def tail_layouts(self, layout: Layout) -> tuple[Layout, ...]:
        """Sequences that the model makes behind its last block of the one that it gets, of that layout."""
        return ()

    def around_attention(self, attention: nn.Module, removed: Removed) -> Scope | None:
        """What to switch on while an attention module runs on a sequence of which tokens were removed."""
        return None


class Setting(Adaptation):
    """An attribute of the model's own that must have a certain value while the model is sparsified.

    Args:
        owner: The object that carries the attribute, such as an attention module or a config.
        name: The attribute, such as a switch between fused and written-out attention.
        value: The value it takes; `unsparsify` restores the old one.
    """

    def __init__(self, *, owner: Any, name: str, value: Any) -> None:
        self.owner, self.name, self.value = owner, name, value
        self._previous: list[Any] = []

    def check(self, model: nn.Module, *, restores: bool) -> None:
        if not hasattr(self.owner, self.name):
            raise UnsupportedModelError(
                f"a Setting of the Backbone names {self.name!r}, which {type(self.owner).__name__} has not."
            )

    def apply(self) -> None:
        previous = getattr(self.owner, self.name)
        setattr(self.owner, self.name, self.value)
        self._previous.append(previous)

    def undo(self) -> None:
        while self._previous:
            setattr(self.owner, self.name, self._previous.pop())


class GridMethods(Adaptation):
    """Methods of a model that reshape tokens into a grid, and refuse to run while some are missing.

    Args:
        model: The module whose methods they are.
        names: Their names. With ``"forward"`` among them, the model can only be sparsified if pruned tokens are
            restored.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model, self.names = model, tuple(names)

    def modules(self) -> Iterable[nn.Module]:
        return (self.model,)

    def check(self, model: nn.Module, *, restores: bool) -> None:
        for name in self.names:
            if not callable(getattr(type(self.model), name, None)):
                raise UnsupportedModelError(f"GridMethods names {name!r}, no method of {type(self.model).__name__}.")
        if "forward" in self.names and not restores:
            raise UnsupportedModelError(
                f'{type(model).__name__} puts out feature maps, which need every token; pass pruned="preserve".'
            )

    def install_outside(self, blocks: Sequence[nn.Module], running: RunningModel) -> Iterator[RemovableHandle]:
        for name in self.names:
            self.model.__dict__[name] = _GuardedMethod(running, self.model, name)
        yield from ()

    def undo(self) -> None:
        for name in self.names:
            if isinstance(self.model.__dict__.get(name), _GuardedMethod):
                del self.model.__dict__[name]


class _GuardedMethod:
    """Stands in for a method of the model, and refuses while tokens are missing."""

    def __init__(self, running: RunningModel, model: nn.Module, name: str) -> None:
        self.running, self.model, self.name = running, model, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.running.drops():
            raise StateError(
                f"{type(self.model).__name__}.{self.name} needs the full grid of tokens, and this model drops some. "
                'Sparsify it with pruned="preserve", or call the method inside tokenprune.dense(model).'
            )
        return getattr(type(self.model), self.name)(self.model, *args, **kwargs)


class TokenTable(Adaptation):
    """A tensor that an attention module keeps as an attribute, with an entry for each token.

    Args:
        owner: The attention module.
        name: The attribute.
        pattern: What the tensor is, and what each image gets of it, such as ``"b n m d -> b n m d"`` (see
            `tokenprune.backbones.patterns`).
        build: Makes the tensor for a number of tokens.
    """

    summary_obstacle = "attention keeps a table with an entry for each token"
    packing_obstacle = "attention keeps a table with an entry for each token"

    def __init__(self, *, owner: nn.Module, name: str, pattern: str, build: Callable[[int], Tensor]) -> None:
        self.owner, self.name, self.pattern, self.build = owner, name, pattern, build

    def modules(self) -> Iterable[nn.Module]:
        return (self.owner,)

    def around_attention(self, attention: nn.Module, removed: Removed) -> Scope | None:
        if attention is not self.owner:
            return None
        full = getattr(attention, self.name)
        if full is None or sizes(full)[self.pattern.split().index("n")] != removed.length:
            full = self.build(removed.length)
        return _Swap(attention, self.name, full, gather_tokens(full, self.pattern, removed.positions))


class _Swap:
    """One tensor in the place of another while a module runs."""

    def __init__(self, owner: nn.Module, name: str, before: Tensor, value: Tensor) -> None:
        self.owner, self.name, self.before, self.value = owner, name, before, value

    def enter(self) -> None:
        setattr(self.owner, self.name, self.value)

    def leave(self) -> None:
        setattr(self.owner, self.name, self.before)

    def check(self, module: nn.Module) -> None:
        """Nothing is expected."""


class WrittenOutAttention(Adaptation):
    """Attention with a softmax of its own, instead of `F.scaled_dot_product_attention`."""

    packing_obstacle = "attention is written out, so that it could only be split by image as one large matrix"


class AttentionBias(Adaptation):
    """Attention adds a bias of its own over all tokens to the scores, which is gathered for those left."""

    summary_obstacle = "attention adds a bias for each pair of tokens"

    def __init__(self) -> None:
        self._scope = _BiasGather()

    def around_attention(self, attention: nn.Module, removed: Removed) -> Scope | None:
        self._scope.removed = removed
        return self._scope


class _BiasGather(Interception):
    """While a block's attention runs: a bias over all pairs of tokens is gathered for those that are left."""

    def __init__(self) -> None:
        super().__init__()
        self.removed: Removed | None = None

    def leave(self) -> None:
        super().leave()
        self.removed = None

    def attention(self, call: AttentionCall) -> Tensor:
        bias, removed = call.attn_mask, self.removed
        if removed is None or bias is None or sizes(bias)[-1] != removed.length:
            return call.run()
        if sizes(removed.positions)[1] == removed.length:  # all of them
            return call.run()
        return call._replace(attn_mask=gather_mask(bias, removed.positions)).run()
