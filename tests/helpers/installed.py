"""What somebody else would install: a library of models, and an adapter for it, in tests/helpers/third_party."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "third_party"


def install_toys(monkeypatch: pytest.MonkeyPatch, folder: Path, *, version: str = "1.5") -> Any:
    """Make toy_vits and its adapter known until the test is over, as if pip had installed them.

    Args:
        monkeypatch: Of the test.
        folder: An empty one, for what pip would write down.
        version: Of the library.

    Returns:
        The adapter's package.
    """
    about = folder / f"toy_vits-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: toy_vits\nVersion: {version}\n")
    (about / "entry_points.txt").write_text("[tokenprune.adapters]\ntoy_vits = tokenprune_toy_vits:ToyAdapter\n")
    for path in (FOLDER, folder):
        monkeypatch.syspath_prepend(path)
    import tokenprune_toy_vits

    return tokenprune_toy_vits
