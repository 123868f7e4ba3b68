"""The models that were proved: the file ``supported.json`` in the package of an adapter, read and written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenprune.backbones.entry_points import adapter_entries
from tokenprune.errors import TokenpruneError, UnsupportedModelError

FILE = "supported.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SupportedModel:
    """A model on which the protocol of proof has been run.

    Attributes:
        library: Root package of the library. It is not in the file: the adapter's entry point names it.
        family: What the library files the model under.
        name: Its entry point or class.
        model_class: The class of the model.
        pooling: What becomes of the tokens after the last block.
        position_encoding: How positions enter.
        side_inputs: Names of the blocks' inputs that are gathered with the tokens, since they have an entry for each,
            and ``"bias"`` where attention itself makes one for each pair.
        passes: What was proved: ``"identity"``, ``"mask = gather"``, ``"undo"``, ``"training step"``, and for
            one model of each kind ``"compile"`` and ``"export"``.
        pruned: The reduction with which it was proved.
    """

    library: str
    family: str
    name: str
    model_class: str
    pooling: str
    position_encoding: str
    side_inputs: tuple[str, ...]
    passes: tuple[str, ...]
    pruned: str = "drop"

    def to_dict(self) -> dict[str, Any]:
        """The model's entry in the file: all attributes but the library, as strings and lists of strings."""
        return {
            **{name: getattr(self, name) for name in _STRINGS},
            **{name: list(getattr(self, name)) for name in _LISTS},
            **({} if self.pruned == "drop" else {"pruned": self.pruned}),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], *, library: str) -> SupportedModel:
        """Read what `to_dict` gave; fields that are not known here are left out.

        Raises:
            TokenpruneError: A field is missing or of another type.
        """
        values: dict[str, Any] = {name: fields.get(name) for name in (*_STRINGS, *_LISTS)}
        for name in _STRINGS:
            if not isinstance(values[name], str):
                raise TokenpruneError(f"{name}={values[name]!r}: expected a string.")
        for name in _LISTS:
            if not isinstance(values[name], list) or not all(isinstance(item, str) for item in values[name]):
                raise TokenpruneError(f"{name}={values[name]!r}: expected a list of strings.")
            values[name] = tuple(values[name])
        pruned = fields.get("pruned", "drop")
        if not isinstance(pruned, str):
            raise TokenpruneError(f"pruned={pruned!r}: expected a string.")
        return cls(library=library, pruned=pruned, **values)


_STRINGS = ("family", "name", "model_class", "pooling", "position_encoding")
_LISTS = ("side_inputs", "passes")


@dataclass(frozen=True, kw_only=True)
class SupportTable:
    """What ``supported.json`` holds.

    Attributes:
        models: The models, by family and name.
        library_version: The version of the library on which they were proved; ``None`` where none is recorded.
        version: Of the file's format; 1 where the file names none.
    """

    models: tuple[SupportedModel, ...]
    library_version: str | None = None
    version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """As the text of the file."""
        fields = {
            "version": self.version,
            "library_version": self.library_version,
            "models": [model.to_dict() for model in self.models],
        }
        return json.dumps(fields, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, *, library: str, where: str) -> SupportTable:
        """Read what `to_json` gave. A file of a later format is read as far as its fields are known here.

        Args:
            text: The text.
            library: Root package of the library whose models they are.
            where: The file it is from, to name in errors.

        Raises:
            TokenpruneError: The text is damaged.
        """
        try:
            fields = json.loads(text)
            version = fields.get("version", 1)
            models = tuple(SupportedModel.from_dict(model, library=library) for model in fields["models"])
            return cls(models=models, library_version=fields.get("library_version"), version=version)
        except (AttributeError, KeyError, TypeError, ValueError, TokenpruneError) as error:
            raise TokenpruneError(
                f"{where} is no table of proved models ({type(error).__name__}: {error}); install the adapter for "
                f"{library} again, or write the file with tokenprune.backbones.supported.write_supported."
            ) from error


def supported(library: str | None = None) -> tuple[SupportedModel, ...]:
    """The models that the tests of the installed adapters have proved.

    A model that is not among them may work as well: `sparsify` says if it cannot, and `verify`
    whether it does. No library is loaded.

    Args:
        library: Root package of a library; ``None`` means all.
    """
    tables = (support_table(name) for name in sorted(adapter_entries()) if library in (None, name))
    return tuple(model for table in tables if table is not None for model in table.models)


def proved_version(library: str) -> str | None:
    """The version of a library on which its adapter's tests proved the models; ``None`` where none is recorded."""
    table = support_table(library)
    return None if table is None else table.library_version


def support_table(library: str) -> SupportTable | None:
    """The table in the package of a library's adapter; ``None`` where there is none.

    Raises:
        TokenpruneError: The file is damaged.
    """
    entry = adapter_entries().get(library)
    file = None if entry is None else _file(entry)
    if file is None or not file.is_file():
        return None
    return SupportTable.from_json(file.read_text(encoding="utf-8"), library=library, where=str(file))


def supported_file(library: str) -> Path:
    """Where the table of a library's adapter is, or is to be written: in the package that its entry point names.

    Raises:
        UnsupportedModelError: The library has no adapter, or its adapter is not in a package.
    """
    entry = adapter_entries().get(library)
    file = None if entry is None else _file(entry)
    if file is None:
        raise UnsupportedModelError(
            f"there is no place for {FILE} of {library!r}: its adapter has to be installed, and in a package."
        )
    return file


def write_supported(file: str | Path, models: Iterable[SupportedModel], *, library_version: str | None) -> None:
    """Write the table of an adapter's models, by family and name.

    Args:
        file: Where; see `supported_file`.
        models: What was proved, all of one library.
        library_version: The version of the library on which it was.
    """
    ordered = tuple(sorted(models, key=lambda model: (model.family, model.name)))
    table = SupportTable(models=ordered, library_version=library_version)
    Path(file).write_text(table.to_json(), encoding="utf-8")


def merge_examples(models: Iterable[SupportedModel]) -> tuple[SupportedModel, ...]:
    """One entry for each model, where several examples of it were proved: what any of them is given, and passes."""
    merged: dict[tuple[str, str], SupportedModel] = {}
    for model in models:
        first = merged.setdefault((model.family, model.name), model)
        merged[model.family, model.name] = replace(
            first,
            side_inputs=tuple(sorted({*first.side_inputs, *model.side_inputs})),
            passes=tuple(dict.fromkeys((*first.passes, *model.passes))),
        )
    return tuple(merged.values())


def _file(entry: EntryPoint) -> Path | None:
    """The file beside the module of an entry point, found without importing that module."""
    try:
        spec = find_spec(entry.module)
    except Exception:  # a package around the module that cannot be imported; whoever needs the adapter gets the reason
        return None
    if spec is None or not spec.parent or spec.origin is None:  # not there, or in no package
        return None
    return Path(spec.origin).parent / FILE
