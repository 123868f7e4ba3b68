"""The final tokens of a teacher, read while it runs, compiled or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tokenprune.api import unwrap
from tokenprune.errors import StateError
from tokenprune.pruning.compilation import give_own_forward


class Watch:
    """A forward hook that keeps what its module put out last."""

    def __init__(self) -> None:
        self.output: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep the output, or the first of several."""
        self.output = output[0] if isinstance(output, tuple) else output


@contextmanager
def watched(teacher: nn.Module, name: str) -> Iterator[Watch]:
    """Keep, while it lasts, what the module of that name puts out.

    In a teacher that is compiled the hook stays behind: compiled code leaves out hooks that come later, and goes on
    calling those that have gone. The module gets a ``forward`` of its own, so that code of another model of the class,
    which has no such hook, is not taken for the teacher's.

    Raises:
        ValueError: There is no module of that name.
        StateError: The teacher ran before the hook was there.
    """
    inner = unwrap(teacher)
    try:
        module = inner.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"the teacher, a {type(inner).__name__}, has no module {name!r} whose tokens could be distilled; "
            "pass distill_weight=0 for a teacher of another architecture."
        ) from None
    if not _is_compiled(teacher):
        watch = Watch()
        handle = module.register_forward_hook(watch)
        try:
            yield watch
        finally:
            handle.remove()
        return
    found = next((hook for hook in module._forward_hooks.values() if isinstance(hook, Watch)), None)
    watch = Watch() if found is None else found
    if found is None:
        give_own_forward([module])
        module.register_forward_hook(watch)
    try:
        yield watch
        if watch.output is None:
            raise StateError(
                "the compiled teacher had run before this loss asked it for its tokens; compile it anew, "
                "torch.compile(teacher), and let the loss be the first to run it."
            )
    finally:
        watch.output = None


def _is_compiled(model: nn.Module) -> bool:
    return "_orig_mod" in model._modules or getattr(model, "_compiled_call_impl", None) is not None
