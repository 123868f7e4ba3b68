"""How the modules of a model are called in one run, for whoever looks for parts of its blocks."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokenprune.backbones.token_wise import first_tensor


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


def record_calls(model: nn.Module, run: Callable[[], None]) -> Recording:
    """Run a model and note how its modules are called.

    Args:
        model: The model.
        run: Runs it.
    """
    names = {module: name for name, module in model.named_modules()}
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
        tokens = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(tokens, Tensor):
            return
        call, widths = calls[module], linear_widths(module)
        call.output_shape = tuple(tokens.shape)
        # Outputs that may be a part's are kept: of a layer back to fewer channels, and of what holds such layers.
        if (widths is not None and widths[0] > widths[1]) or (module in holders and call.output_shape == call.shape):
            call.output = tokens
        if "norm" in type(module).__name__.lower():
            last[:] = [(module, weakref.ref(tokens))]

    with ExitStack() as hooks:
        for module in model.modules():
            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        run()
    return Recording(calls, names)
