"""Finding the adapter that knows a model, through the entry-point group ``tokenprune.adapters``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, packages_distributions, version
from importlib.resources import files
from typing import Protocol, cast

from torch import Tensor, nn

from tokenprune.backbones.backbone import Backbone
from tokenprune.backbones.preprocessing import Preprocessing
from tokenprune.errors import CheckpointError, UnsupportedModelError

ENTRY_POINT_GROUP = "tokenprune.adapters"


class Adapter(Protocol):
    """An adapter: a module that describes the models of one library.

    An entry point's name is the root package of the classes it describes, its value the module.
    Importing the module must not import that library; the model that is handed over already has.
    Beside it a file ``supported.json`` may list the models that its tests have proved, and in it there may
    be a function ``from_state_dict``, see `Builder`, and a function ``preprocessing``, see `Preprocessor`.

    Optional, so that models can be saved and found by name (see the docs page "Write an adapter"):

    - ``identity(model) -> dict``: what ``build`` needs, as an object of JSON. Raises `UnsupportedModelError`.
    - ``build(identity, *, pretrained=False) -> nn.Module``: a model like it, with weights that mean nothing or the
      public ones. Raises `UnsupportedModelError`.
    - ``load(name, *, pretrained=False, image_size=None) -> nn.Module``: the model of a name, folder or Hub id.
      Raises `LookupError` where it is none of the library's.
    - ``names() -> Iterable[str]``: names that ``load`` takes, to suggest one.
    """

    def describe(self, model: nn.Module) -> Backbone:
        """Describe ``model``.

        Raises:
            UnsupportedModelError: The model cannot be described; the message says why.
        """
        ...


class Builder(Protocol):
    """An adapter that also builds dense models from nothing but their weights, for official checkpoints."""

    def from_state_dict(self, state: Mapping[str, Tensor], *, num_heads: int | None) -> nn.Module:
        """The model that a state dict is of, with any weights: the caller loads them.

        Args:
            state: The dense model's weights under the names that its authors gave them.
            num_heads: Heads of the attention; ``None`` means the adapter is to know.

        Raises:
            CheckpointError: The adapter knows no model with such weights, or needs ``num_heads``.
        """
        ...


class Preprocessor(Protocol):
    """An adapter that also knows how pictures become a model's input, for showing what the model does with them."""

    def preprocessing(self, model: nn.Module) -> Preprocessing:
        """What ``model`` was made for, as its library says.

        Raises:
            UnsupportedModelError: The model takes no pictures, or takes them in a way that cannot be described.
        """
        ...


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """How pictures become the input of ``model``, by the adapter of the library its class comes from.

    Raises:
        UnsupportedModelError: No adapter says.
    """
    library = library_of(model)
    found = None if library is None else adapter(library)
    if not hasattr(found, "preprocessing"):
        raise UnsupportedModelError(
            f"no adapter says how pictures become the input of a {type(model).__name__}; pass "
            "preprocessing=tokenprune.Preprocessing(size=…, mean=…, std=…)."
        )
    return cast(Preprocessor, found).preprocessing(model)


def model_of(state: Mapping[str, Tensor], *, num_heads: int | None) -> nn.Module:
    """A dense model that a state dict is of, built by the first adapter that knows it; its weights are not loaded.

    Raises:
        CheckpointError: None does; the message has the reason of each that builds models.
    """
    refusals: dict[str, CheckpointError] = {}
    for name in libraries():
        builder = adapter(name)
        if not hasattr(builder, "from_state_dict"):
            continue
        try:
            return cast(Builder, builder).from_state_dict(state, num_heads=num_heads)
        except CheckpointError as error:
            refusals[name] = error
        except ModuleNotFoundError as error:
            refusals[name] = CheckpointError(f"the model would be one of {name}, which is not installed ({error}).")
    if not refusals:
        raise CheckpointError("no installed adapter builds models from official checkpoints.")
    if len(refusals) == 1:
        raise next(iter(refusals.values()))
    raise CheckpointError("\n".join(["no adapter knows a model with these weights.", *map(str, refusals.values())]))


def describe(model: nn.Module) -> Backbone:
    """The description of ``model`` by the adapter of the library its class comes from.

    Raises:
        UnsupportedModelError: No adapter knows the class, or its adapter refuses it.
    """
    library = library_of(model)
    if library is None:
        raise UnsupportedModelError(_unknown(model, _entries()))
    return adapter(library).describe(model)


def library_of(model: nn.Module) -> str | None:
    """Root package of the library whose adapter knows the class of ``model``, or one of its bases."""
    entries = _entries()
    packages = (base.__module__.partition(".")[0] for base in type(model).__mro__)
    return next((package for package in packages if package in entries), None)


def libraries() -> tuple[str, ...]:
    """Root packages of the libraries that have an adapter, whether or not they are installed."""
    return tuple(sorted(_entries()))


def installed_version(library: str) -> str | None:
    """The version of a library that is installed, found without loading it; ``None`` if it is not."""
    names = (library, *packages_distributions().get(library, ()))
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def proved_version(library: str) -> str | None:
    """The version of a library on which its adapter's tests proved the models; ``None`` where none is recorded."""
    entry = _entries().get(library)
    file = None if entry is None else files(entry.module) / "supported.json"
    if file is None or not file.is_file():
        return None
    recorded: str | None = json.loads(file.read_text(encoding="utf-8")).get("library_version")
    return recorded


def adapter(library: str) -> Adapter:
    """The adapter of a library.

    Raises:
        UnsupportedModelError: There is none.
    """
    entries = _entries()
    if library not in entries:
        raise UnsupportedModelError(
            f"no adapter for {library!r} is installed; there are some for {', '.join(sorted(entries)) or 'nothing'}."
        )
    return cast(Adapter, entries[library].load())


@dataclass(frozen=True, kw_only=True)
class SupportedModel:
    """A model on which the protocol of proof has been run.

    Attributes:
        library: Root package of the library.
        family: What the library files the model under.
        name: Its entry point or class.
        model_class: The class of the model.
        pooling: What becomes of the tokens after the last block.
        position_encoding: How positions enter.
        side_inputs: Names of the blocks' inputs that are cut down with the tokens.
        passes: What was proved: ``"identity"``, ``"mask = gather"``, ``"undo"``, ``"training step"``, and for
            one model of each kind ``"compile"`` and ``"export"``.
    """

    library: str
    family: str
    name: str
    model_class: str
    pooling: str
    position_encoding: str
    side_inputs: tuple[str, ...]
    passes: tuple[str, ...]


def supported(library: str | None = None) -> tuple[SupportedModel, ...]:
    """The models that the tests of the installed adapters have proved.

    A model that is not among them may work as well: `sparsify` says if it cannot, and `verify`
    whether it does. No library is loaded.

    Args:
        library: Root package of a library; ``None`` means all.
    """
    return tuple(
        model for name, entry in sorted(_entries().items()) if library in (None, name) for model in _proved(name, entry)
    )


def _proved(library: str, entry: EntryPoint) -> Iterator[SupportedModel]:
    file = files(entry.module) / "supported.json"
    if file.is_file():
        for fields in json.loads(file.read_text(encoding="utf-8"))["models"]:
            lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
            yield SupportedModel(library=library, **{**fields, **lists})


def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


def _unknown(model: nn.Module, entries: dict[str, EntryPoint]) -> str:
    cls = type(model)
    families = {name: sorted({one.family for one in _proved(name, entry)}) for name, entry in sorted(entries.items())}
    lines = [
        f"no adapter knows {cls.__module__}.{cls.__qualname__}.",
        "Proved are (tokenprune.supported() names the models), and others like them work too:",
        *(f"  {name}: {', '.join(proved)}" for name, proved in families.items()),
        "For any other model whose blocks take and return (B, L, C) tokens, say where they are:",
        "  tokenprune.sparsify(model, backbone=tokenprune.Backbone(",
        "      blocks=model.blocks, num_prefix_tokens=1, embed_dim=384))",
    ]
    return "\n".join(lines)
