"""What `torch.compile` sees of a model, so that it tells modules with hooks from modules of the same class without.

Compiled code belongs to the source of a ``forward``, and is shared by all modules whose guards it passes. Guards leave
out hooks (``torch._dynamo.config.skip_nnmodule_hook_guards``), so that code that was compiled of a dense model would
pass for a sparsified one, and prune nothing; and where blocks are compiled one by one, that of a block in front of the
first stage for one behind it. They do look at whether a module has a ``forward`` of its own. So modules with hooks have
one, and no others do; the tower, whose code contains theirs, keeps that of its class. Hooks that code was compiled with
are guarded by what they read.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType

from torch import nn


def give_own_forward(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Give modules the ``forward`` of their class as an attribute of their own; returns those that had none."""
    changed = [module for module in modules if "forward" not in module.__dict__]
    for module in changed:
        module.__dict__["forward"] = MethodType(type(module).forward, module)
    return changed


def take_own_forward(modules: Iterable[nn.Module]) -> None:
    """Take away what `give_own_forward` has given, where nobody has put something else in its place."""
    for module in modules:
        if not has_own_forward(module):
            module.__dict__.pop("forward", None)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module runs something else than the ``forward`` of its class."""
    own = module.__dict__.get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward
