"""The file ``tokenprune.json``: what a saved folder records of the model whose weights are in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenprune.errors import CheckpointError
from tokenprune.pruning.record import Record

MANIFEST = "tokenprune.json"
WEIGHTS = "tokenprune.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All of a saved model but its tensors.

    Attributes:
        record: How the model was sparsified.
        scorers_only: Whether the weights are those of the scorers alone, to go with a public base model.
        model_class: Full name of the base model's class, for people.
        depth: How many blocks the base model has.
        embed_dim: Width of its tokens.
        library: Root package of the library that can rebuild it; ``None`` where none can.
        identity: What that library's adapter builds it from.
        why_no_identity: What kept it from being rebuilt.
        buffer_dtypes: dtypes of buffers that are not among the weights, where they are not what a new model has.
        blocks_sha256: Checksum of the base model's blocks, where scorers were saved alone.
        versions: Of the packages that wrote it.
    """

    record: Record
    scorers_only: bool
    model_class: str
    depth: int
    embed_dim: int
    library: str | None = None
    identity: Mapping[str, Any] | None = None
    why_no_identity: str | None = None
    buffer_dtypes: Mapping[str, str] = field(default_factory=dict)
    blocks_sha256: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """As the text of the file."""
        model = {
            "class": self.model_class,
            "depth": self.depth,
            "embed_dim": self.embed_dim,
            "library": self.library,
            "identity": self.identity,
            "why_no_identity": self.why_no_identity,
            "buffer_dtypes": dict(self.buffer_dtypes),
            "blocks_sha256": self.blocks_sha256,
        }
        fields = {
            "format": "tokenprune",
            "version": FORMAT_VERSION,
            **self.record.to_dict(),
            "weights": "scorers" if self.scorers_only else "all",
            "model": model,
            "written_by": dict(self.versions),
        }
        return json.dumps(fields, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Read what `to_json` gave.

        Args:
            text: The text.
            where: The file it is from, to name in errors.

        Raises:
            CheckpointError: The text is damaged, of a later version or something else.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{where} is damaged: it is not JSON ({error}).") from error
        if not isinstance(fields, dict) or fields.get("format") != "tokenprune":
            raise CheckpointError(f"{where} is not what tokenprune.save_pretrained writes.")
        version = fields.get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise CheckpointError(f"{where} is damaged: its version is {version!r}.")
        if version > FORMAT_VERSION:
            wrote = fields.get("written_by", {})
            wrote = wrote.get("tokenprune", "a later one") if isinstance(wrote, dict) else "a later one"
            raise CheckpointError(
                f"{where} has version {version}, and this tokenprune reads up to {FORMAT_VERSION}; install the "
                f"tokenprune that wrote it ({wrote}), or a later one."
            )
        try:
            record = Record.from_dict(fields)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from error
        model = _entry(fields, "model", dict, where)
        if _entry(fields, "weights", str, where) not in ("all", "scorers"):
            raise CheckpointError(f"{where} is damaged: weights={fields['weights']!r}, expected 'all' or 'scorers'.")
        none = type(None)
        return cls(
            record=record,
            scorers_only=fields["weights"] == "scorers",
            model_class=_entry(model, "class", str, where),
            depth=_entry(model, "depth", int, where),
            embed_dim=_entry(model, "embed_dim", int, where),
            library=_entry(model, "library", (str, none), where),
            identity=_entry(model, "identity", (dict, none), where),
            why_no_identity=_entry(model, "why_no_identity", (str, none), where),
            buffer_dtypes=_entry(model, "buffer_dtypes", dict, where),
            blocks_sha256=_entry(model, "blocks_sha256", (str, none), where),
            versions=_entry(fields, "written_by", dict, where),
        )

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            CheckpointError: It is missing, damaged, of a later version or something else.
        """
        file = folder / MANIFEST
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder} has no {MANIFEST}; it is not what tokenprune.save_pretrained writes."
            ) from None
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file} is damaged: it is not text ({error}).") from error
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
        return cls.from_json(text, str(file))


def _entry(fields: dict[str, Any], name: str, kind: Any, where: str) -> Any:
    if name not in fields:
        raise CheckpointError(f"{where} is damaged: it has no {name!r}.")
    if not isinstance(fields[name], kind):
        raise CheckpointError(f"{where} is damaged: {name}={fields[name]!r}.")
    return fields[name]
