"""What an execution is, and the table of executions by name.

Shapes: B images, N patch tokens, m of them that reach a stage, n kept ones, L tokens before any pruning, K tokens of
the sequence as it is, C channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor

from tokenprune.backbones.backbone import Backbone
from tokenprune.backbones.interception import Interception
from tokenprune.backbones.padded import Images
from tokenprune.errors import UnsupportedModelError
from tokenprune.pruning.selection import Selection
from tokenprune.pruning.trace import Trace
from tokenprune.tokens import Layout

if TYPE_CHECKING:
    from tokenprune.pruning.executions.paths import Paths


class Execution(ABC):
    """How the decisions of stages are carried out while a model runs.

    The central invariant of the library: for the same decisions, all executions give the same output. One object
    serves one model, pass after pass; what it keeps belongs to the pass that is running, see `begin`.

    Attributes:
        trains: Whether a gradient reaches the decisions, which are sampled in training, and blocks may be run again
            by activation checkpointing. The first execution that trains is what ``"auto"`` takes in training mode, the
            first that does not is what it takes in eval mode.
        removes: Whether pruned tokens are removed, so that blocks run on shorter sequences.
        intercepts: Whether attention has to be intercepted in every block behind a stage that has pruned; a block that
            does not call its attention modules is then an error.
        by_image: Whether images may keep different numbers of tokens where decisions are not sampled.
        runs_packed: Whether the model packs the images of a batch itself, so that what `resume` gives and `restore`
            takes is one sequence for all.
    """

    trains: ClassVar[bool] = False
    removes: ClassVar[bool] = False
    intercepts: ClassVar[bool] = False
    by_image: ClassVar[bool] = False
    runs_packed: ClassVar[bool] = False

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    @classmethod
    def obstacles(cls, backbone: Backbone) -> tuple[str, ...]:
        """Why a model cannot run in this execution; empty if it can."""
        return ()

    def begin(self) -> None:  # noqa: B027 - most executions keep nothing
        """Forget what belongs to an earlier pass."""

    def start(self, layout: Layout, images: Images | None) -> Selection:
        """What reaches the first stage: everything.

        Args:
            layout: Of the sequence that the first block gets.
            images: Those in it, where they are of different sizes.
        """
        return Selection(layout, all_kept=True)

    # Deciding

    @abstractmethod
    def keeps_all(self, num_keep: int, num_reached: int, *, probability: float, sampled: bool) -> bool:
        """Whether a stage prunes nothing of what reaches it, so that its scorer need not be asked.

        Where decisions are not sampled, all executions must say the same.

        Args:
            num_keep: n, how many patch tokens of each image it is to keep.
            num_reached: m, how many the stage before it has kept; N in front of the first one.
            probability: The fraction that it is to keep of what reaches it.
            sampled: Whether its decisions are to be sampled.
        """

    @abstractmethod
    def pass_all(self, before: Selection, tokens: Tensor) -> Selection:
        """The selection behind a stage that prunes nothing of the sequence (B, K, C)."""

    @abstractmethod
    def decide(self, scores: Tensor, before: Selection, num_keep: int | Tensor, *, sampled: bool) -> Selection:
        """The selection behind a stage.

        Args:
            scores: (B, m), higher = keep; log-odds where ``sampled``.
            before: What reached the stage.
            num_keep: n, how many of each image to keep where decisions are not sampled; or, in an execution
                ``by_image``, (B,) int64.
            sampled: Whether the scorer's decisions are to be sampled, which an execution that trains does.
        """

    def decide_up_to(
        self, scores: Tensor, before: Selection, num_keep: Tensor, most: int, *, sampled: bool
    ) -> Selection:
        """The same where images are of different sizes, and no one of them keeps more than ``most``."""
        return self.decide(scores, before, num_keep, sampled=sampled)

    # Applying

    @abstractmethod
    def remove(self, tokens: Tensor, before: Selection, selection: Selection) -> Tensor:
        """Of the sequence (B, K, C) that reached a stage what goes on; summary tokens are added later."""

    def shorten(self, selection: Selection, before: Selection) -> Selection:
        """The selection without tokens that the stages ``before`` have pruned, where nothing asks for them any more.

        It is asked where decisions are sampled, and nothing looks at pruned tokens but the attention of blocks.
        """
        return selection

    def complete(self, tokens: Tensor, selection: Selection, layout: Layout) -> Tensor:
        """Of the sequence (B, K, C) behind the last block, of that layout, the one with what `shorten` left out."""
        return tokens

    def lay_out(self, selection: Selection) -> Selection:
        """The selection with its ``packing``, where blocks are to run on one sequence for all images."""
        return selection

    @abstractmethod
    def resume(self, tokens: Tensor, selection: Selection, full: Layout) -> Tensor:
        """Of all tokens (B, L, C), of layout ``full``, those that a block runs on, where the others are restored."""

    @abstractmethod
    def restore(self, tokens: Tensor, selection: Selection, everything: Tensor, full: Layout) -> Tensor:
        """All tokens (B, L, C) behind a block: those that it ran on (B, K, C), and the others as they were before it.

        Neither has summary tokens. Where the selection has ``hosts``, a pruned token takes the state of its host.

        Args:
            tokens: What the block gave.
            selection: What is in force.
            everything: (B, L, C), all tokens before the block.
            full: The layout of all tokens.
        """

    # Two paths, where every token stays in the sequence

    def others(self, tokens: Tensor, selection: Selection, full: Layout) -> Tensor:
        """Of all tokens (B, L, C) those that take the other path than what `resume` gives; all of them by default."""
        return tokens

    def join(self, kept: Tensor, others: Tensor, selection: Selection, full: Layout) -> Tensor:
        """All tokens (B, L, C) of both paths: of those that `resume` gave, and of those that `others` gave."""
        return self.restore(kept, selection, others, full)

    def paths(self, selection: Selection, full: Layout) -> Paths | None:
        """The two paths that a block's tokens take; ``None`` where they take one."""
        return None

    # What the model does besides

    def side_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str], selection: Selection, full: Layout
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What a block is given besides tokens, for the tokens it runs on; ``None`` if nothing changes.

        Args:
            args: The block's positional arguments, with the tokens it runs on.
            kwargs: Its keyword arguments.
            names: The names of its parameters, in order.
            selection: What is in force.
            full: The sequence before any pruning.
        """
        return None

    # Intercepting

    def attention(self, selection: Selection, layouts: Sequence[Layout]) -> Interception | None:
        """What a block's attention is to be intercepted by, ``None`` if by nothing.

        Args:
            selection: What is in force.
            layouts: Of the sequence that the block gets, and of those that it may attend over besides.
        """
        return None

    def mask_weights(self, weights: Tensor) -> Tensor | None:
        """Attention weights (B, K, K, H) that a block has mixed after its softmax, masked again; ``None`` if as is."""
        return None

    def tail(self, selection: Selection, layouts: Sequence[Layout]) -> Interception | None:
        """What the model behind its last block is to be intercepted by, ``None`` if by nothing.

        Args:
            selection: What is in force.
            layouts: Of the sequence behind the last block, and of those that the tail may make of it.
        """
        return None

    def reached(self, values: Tensor, before: Selection) -> Tensor:
        """Of values of all patch tokens in the sequence (B, N, …) those of what reached a stage: (B, m, …)."""
        return values

    def gathered(self) -> tuple[Tensor, ...]:
        """Side inputs that were gathered for the block that is running, each image's own."""
        return ()

    def hidden(self, value: Any, trace: Trace, stages: Sequence[int]) -> Any:
        """What the vision tower returns, with a row for each image in what blocks gave.

        Args:
            value: A tensor, or tensors in tuples and mappings.
            trace: The pass that made it.
            stages: For each block the last stage in front of it, -1 if there is none.
        """
        return value

    def output(self, value: Any, trace: Trace, num_keep: Sequence[int], stages: Sequence[int]) -> Any:
        """What the vision tower returns, cut down to the tokens left, for a model that takes any number of them.

        Args:
            value: A tensor, or tensors in tuples and mappings.
            trace: The pass that made it.
            num_keep: How many patch tokens each stage keeps.
            stages: For each block the last stage in front of it, -1 if there is none.
        """
        return value


_Class = TypeVar("_Class", bound=type[Execution])
_EXECUTIONS: dict[str, type[Execution]] = {}
AUTO = "auto"


def register_execution(name: str) -> Callable[[_Class], _Class]:
    """Decorate a subclass of `Execution`, to make it available as ``model.tokenprune.execution = name``."""

    def add(execution: _Class) -> _Class:
        _EXECUTIONS[name] = execution
        return execution

    return add


def executions() -> tuple[str, ...]:
    """The names of all executions, in the order in which they were registered."""
    return tuple(_EXECUTIONS)


def execution_class(name: str) -> type[Execution]:
    """The execution of a name."""
    return _EXECUTIONS[name]


def default_execution(*, training: bool, by_image: bool = False) -> str:
    """The execution that ``"auto"`` takes in training mode, or in eval mode.

    Args:
        training: Which of them.
        by_image: Whether images are to keep different numbers of tokens.
    """
    chosen = (one for one in _EXECUTIONS.items() if one[1].trains is training and (one[1].by_image or not by_image))
    return next(name for name, _ in chosen)


def chosen_execution(name: str, *, training: bool, by_image: bool) -> str:
    """The execution of a name, which may be ``"auto"``; see `default_execution`."""
    return default_execution(training=training, by_image=by_image) if name == AUTO else name


def check_execution(name: str, backbone: Backbone) -> None:
    """Refuse a name that is none, and an execution in which a model cannot run.

    Raises:
        ValueError: It is neither ``"auto"`` nor the name of an execution.
        UnsupportedModelError: The message says what is in the way.
    """
    if not isinstance(name, str) or name not in (AUTO, *_EXECUTIONS):
        *others, last = (repr(choice) for choice in (AUTO, *_EXECUTIONS))
        raise ValueError(f"execution={name!r}: choose {', '.join(others)} or {last}.")
    obstacles = () if name == AUTO else _EXECUTIONS[name].obstacles(backbone)
    if obstacles:
        raise UnsupportedModelError(f"this model cannot run in {name!r} execution: {'; '.join(obstacles)}.")
