"""Reading what a recipe recorded of a run: ``results.json`` and ``log.jsonl`` in its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenprune.errors import PictureError

RESULTS, LOG = "results.json", "log.jsonl"
Curve = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run that is complete.

    Attributes:
        name: The name of its folder.
        settings: What it was run with.
        scores: ``top1`` and others as fractions; those of the dense path under ``dense_top1`` and so on.
        gmacs: ``dense``, and of a sparsified model ``sparse``: 10⁹ multiply-adds an image.
        versions: Of the libraries it was made with.
        command: What made it; empty where that was not recorded.
        training: Lines of the log, each with its ``step``.
        evaluation: The same, of evaluations.
    """

    name: str
    settings: Mapping[str, Any]
    scores: Mapping[str, float]
    gmacs: Mapping[str, float]
    versions: Mapping[str, str]
    command: str
    training: list[dict[str, float]]
    evaluation: list[dict[str, float]]

    def kept(self) -> dict[str, Curve]:
        """By stage, the share of patch tokens that it kept, over the steps of training."""
        names = sorted({name for line in self.training for name in line if name.startswith("kept_")}, key=_number)
        return {f"stage {_number(name)}": _curve(self.training, name) for name in names}

    def accuracy(self) -> dict[str, Curve]:
        """Top-1 accuracy over the steps of training, of the sparse and of the dense path."""
        paths = {"sparse" if "sparse" in self.gmacs else "dense": "top1", "dense path": "dense_top1"}
        curves = {path: _curve(self.evaluation, name) for path, name in paths.items()}
        return {path: curve for path, curve in curves.items() if curve}


def is_run(folder: str | Path) -> bool:
    """Whether a recipe has written results there."""
    return (Path(folder) / RESULTS).is_file()


def read_run(folder: str | Path) -> Run:
    """The run in a folder.

    Raises:
        PictureError: There is no run, none that is complete, or its results are damaged.
    """
    file = Path(folder) / RESULTS
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PictureError(
            f"{folder} holds no run that is complete: {file.name} cannot be read ({error.strerror}). A recipe writes "
            "it when it has finished."
        ) from error
    except (ValueError, RecursionError) as error:
        raise PictureError(f"{file} is damaged: {error}.") from error
    parts = {name: results.get(name) if isinstance(results, dict) else None for name in ("scores", "gmacs")}
    for name, part in parts.items():
        if not isinstance(part, dict) or not all(_is_number(value) for value in part.values()):
            raise PictureError(f"{file} was written by no recipe of tokenprune: it has no {name!r} with numbers.")
    if any(gmacs <= 0 for gmacs in (parts["gmacs"] or {}).values()):
        raise PictureError(f"{file} was written by no recipe of tokenprune: of its 'gmacs' some are not above 0.")
    log = _log(Path(folder) / LOG)
    return Run(
        name=Path(folder).resolve().name,
        settings=_object(results.get("settings")),
        scores=parts["scores"] or {},
        gmacs=parts["gmacs"] or {},
        versions={name: str(value) for name, value in _object(results.get("versions")).items()},
        command=str(results.get("command", "")),
        training=[line for kind, line in log if kind == "training"],
        evaluation=[line for kind, line in log if kind == "evaluation"],
    )


def _log(file: Path) -> list[tuple[str, dict[str, float]]]:
    """Kind and numbers of every line that can be read; the last line of a run that was killed may be torn."""
    lines: list[tuple[str, dict[str, float]]] = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(fields, dict) and _is_number(fields.get("step")):
            numbers = {name: float(value) for name, value in fields.items() if _is_number(value)}
            lines.append((str(fields.get("kind")), numbers))
    return lines


def _curve(lines: list[dict[str, float]], name: str) -> Curve:
    return [(line["step"], line[name]) for line in lines if name in line]


def _number(name: str) -> int:
    digits = name.rpartition("_")[2]
    return int(digits) if digits.isdecimal() else 0


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
