"""An entry of the census: a small model of a library, and what it is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import nn

STAGES, KEEP_RATIO, NUM_IMAGES = (1, 2), (0.6, 0.36), 3


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model that a library can build, at a small size.

    Attributes:
        library: The library.
        family: What the library files the model under, such as "vision_transformer" or "dinov2".
        name: What the library calls it: the name of an entry point or of a class.
        build: Makes the model, with random weights and in training mode.
        inputs: Given how many images and a generator, the keyword arguments of a forward pass on different images.
    """

    library: str
    family: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], dict[str, Any]]

    def __str__(self) -> str:
        return f"{self.library} {self.name}"

    def model(self) -> nn.Module:
        """The model in eval mode, every parameter drawn anew, so that no zero hides anything."""
        generator = torch.Generator().manual_seed(7)
        model = self.build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return model

    def example(self) -> dict[str, Any]:
        """The same inputs every time."""
        return self.inputs(NUM_IMAGES, torch.Generator().manual_seed(8))


def is_older(library: str) -> bool:
    """Whether a library is older than the release whose models the census lists."""
    listed = json.loads((files(f"tokenprune_{library}") / "supported.json").read_text(encoding="utf-8"))
    return Version(version(library)) < Version(listed["library_version"])


def skip_what_older_releases_cannot_run(entry: Entry) -> None:
    """Skip a test where an older release cannot build a model, or run it unpruned."""
    if not is_older(entry.library):
        return
    try:
        with torch.no_grad():
            entry.model()(**entry.example())
    except Exception as error:
        release = f"{entry.library} {version(entry.library)}"
        pytest.skip(f"{release} does not run {entry.name} unpruned: {type(error).__name__}: {error}")
