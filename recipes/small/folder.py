"""Image folders that are made once and reused: written whole, made anew when what they hold is out of date."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes.engine.checkpoints import write_whole


def make_folder(root: Path, config: Any, marker: str, write: Callable[[Path], None]) -> Path:
    """Write an image folder once, or reuse the one that is there.

    An interrupted call leaves nothing that a later one could mistake for a complete folder.

    Args:
        root: The folder to make.
        config: A dataclass: what decides the folder's content. A folder made with another one is made anew.
        marker: Name of the file in the folder that holds ``config`` as JSON.
        write: Called with an empty path; makes a folder of the images there.

    Returns:
        ``root``.

    Raises:
        FileExistsError: The folder holds something that was not made here; it is left as it is.
    """
    description = json.dumps(asdict(config), indent=2) + "\n"
    if (root / marker).exists() and (root / marker).read_text() == description:
        return root
    if root.exists() and not (root / marker).exists() and not (root.is_dir() and not any(root.iterdir())):
        raise FileExistsError(f"{root} holds something else; name a folder that is empty or does not exist yet.")

    def write_marked(partial: Path) -> None:
        write(partial)
        (partial / marker).write_text(description)

    write_whole(root, write_marked)
    return root
