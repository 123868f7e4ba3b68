"""Finding the adapter that knows a model, through the entry-point group ``tokenprune.adapters``."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, cast

from torch import nn

from tokenprune.backbone import Backbone
from tokenprune.errors import UnsupportedModelError

ENTRY_POINT_GROUP = "tokenprune.adapters"


class Adapter(Protocol):
    """An adapter: a module that describes the models of one library.

    An entry point's name is the root package of the classes it describes, its value the module.
    Importing the module must not import that library; the model that is handed over already has.
    """

    SUPPORTED: tuple[str, ...]
    """Names of the classes it can describe, for messages."""

    def describe(self, model: nn.Module) -> Backbone:
        """Describe ``model``.

        Raises:
            UnsupportedModelError: The model cannot be described; the message says why.
        """
        ...


def describe(model: nn.Module) -> Backbone:
    """The description of ``model`` by the adapter of the library its class comes from.

    Raises:
        UnsupportedModelError: No adapter knows the class, or its adapter refuses it.
    """
    entries = _entries()
    for base in type(model).__mro__:
        entry = entries.get(base.__module__.partition(".")[0])
        if entry is not None:
            return _load(entry).describe(model)
    raise UnsupportedModelError(_unknown(model, entries))


def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


def _load(entry: EntryPoint) -> Adapter:
    return cast(Adapter, entry.load())


def _unknown(model: nn.Module, entries: dict[str, EntryPoint]) -> str:
    cls = type(model)
    lines = [
        f"no adapter knows {cls.__module__}.{cls.__qualname__}.",
        "Supported are, with their subclasses:",
        *(f"  {name}: {', '.join(_load(entry).SUPPORTED)}" for name, entry in sorted(entries.items())),
        "For any other model whose blocks take and return (B, L, C) tokens, say where they are:",
        "  tokenprune.sparsify(model, backbone=tokenprune.Backbone(",
        "      blocks=model.blocks, num_prefix_tokens=1, embed_dim=384))",
    ]
    return "\n".join(lines)
