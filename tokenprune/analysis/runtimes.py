"""Runtimes: what runs a model, and how long one batch takes there.

Runtimes that need files are registered by the room that writes them, `tokenprune.saving`.

Shapes: B images of C channels, H × W.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import TokenpruneError, UnsupportedModelError

Timer = Callable[[], float]
"""Runs a batch, and returns the seconds that it took."""

Timers = Callable[[Tensor], list[Timer]]
"""Takes a batch of images (B, C, H, W), and gives a timer of each model."""

Runtime = Callable[[Sequence[nn.Module], Sequence[int]], AbstractContextManager[Timers]]
"""Takes models in eval mode, and channels, height and width of the images; runs them while the context lasts."""

_RUNTIMES: dict[str, Runtime] = {}


def register_runtime(name: str) -> Callable[[Runtime], Runtime]:
    """Register a runtime under the name by which `tokenprune.throughput` finds it."""

    def register(runtime: Runtime) -> Runtime:
        _RUNTIMES[name] = runtime
        return runtime

    return register


def runtime_named(name: str) -> Runtime:
    """The runtime of a name.

    Raises:
        ValueError: There is none.
    """
    if name not in _RUNTIMES:
        raise ValueError(f"runtime={name!r}: choose from {', '.join(map(repr, _RUNTIMES))}.")
    return _RUNTIMES[name]


def in_turn(
    timers: Sequence[Timer], *, rounds: int, warmup: int = 0, progress: Callable[[int, int], None] | None = None
) -> list[tuple[float, ...]]:
    """Time in rounds, each beginning with another one, so that a speed that drifts favours nobody.

    Turning every other round the other way would run the first and the last twice in succession, and find their weights
    in the cache.

    Args:
        timers: What is timed.
        rounds: Rounds that count.
        warmup: Rounds before, which do not.
        progress: Called after each round with the number of rounds done and of all.

    Returns:
        Of each timer its seconds by round.
    """
    seconds: list[list[float]] = [[] for _ in timers]
    for number in range(-warmup, rounds):
        for offset in range(len(timers)):
            index = (number + offset) % len(timers)
            taken = timers[index]()
            if number >= 0:
                seconds[index].append(taken)
        if progress is not None:
            progress(number + warmup + 1, rounds + warmup)
    return [tuple(times) for times in seconds]


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, the work that it leaves to its device included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timers_of(calls: Sequence[Callable[[Tensor], Any]], images: Tensor) -> list[Timer]:
    """Timers of what this process runs."""
    return [partial(timed, partial(call, images), images.device) for call in calls]


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares its weights, so that where these lie in memory makes no difference."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


@register_runtime("eager")
@contextmanager
def eager(models: Sequence[nn.Module], input_size: Sequence[int]) -> Iterator[Timers]:
    """PyTorch, operator by operator."""
    yield partial(timers_of, models)


@register_runtime("compile")
@contextmanager
def compiled(models: Sequence[nn.Module], input_size: Sequence[int]) -> Iterator[Timers]:
    """`torch.compile`: each model whole and for one batch size alone; on CUDA as a graph that is replayed.

    Raises:
        UnsupportedModelError: When timers are asked for: a model cannot be compiled whole.
    """
    yield lambda images: timers_of([_compiled(model, images) for model in models], images)


def _compiled(model: nn.Module, images: Tensor) -> Callable[[Tensor], Any]:
    def run(images: Tensor) -> Any:
        return model(images)

    # Compiled code belongs to the code of a function, and is looked for among all that was compiled of it, of which
    # there may be a few only: each model gets a function whose code is its own.
    own = FunctionType(run.__code__.replace(), globals(), run.__name__, None, run.__closure__)
    mode = "reduce-overhead" if images.device.type == "cuda" else None
    runner: Callable[[Tensor], Any] = torch.compile(own, fullgraph=True, dynamic=False, mode=mode)
    try:
        runner(images)
    except TokenpruneError:
        raise
    except Exception as error:  # of any kind: the compiler's, its backend's, the model's own
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        raise UnsupportedModelError(
            f"this {type(model).__name__} cannot be compiled whole: {type(error).__name__}: {reason}"
        ) from error
    return runner
