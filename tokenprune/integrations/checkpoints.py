"""Which of a Trainer's checkpoints were written to their end."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object


def find_complete(args: Any) -> str | None:
    """The newest checkpoint in ``args.output_dir`` that every process has written to its end, or ``None``.

    The Trainer takes the newest folder, though a process may have been killed while it wrote it.
    """
    folders = Path(args.output_dir).glob("checkpoint-*")
    own = [folder.name for folder in folders if re.fullmatch(r"checkpoint-\d+", folder.name) and _whole(folder, args)]
    every = gather_object(own)
    complete = [name for name in own if every.count(name) == args.world_size]
    if not complete:
        return None
    return str(Path(args.output_dir) / max(complete, key=lambda name: int(name.split("-")[1])))


def newest_complete(args: Any) -> str:
    """The checkpoint that `find_complete` finds.

    Raises:
        ValueError: There is none.
    """
    found = find_complete(args)
    if found is None:
        raise ValueError(f"no complete checkpoint in {args.output_dir}; train from the start, or name another.")
    return found


def _whole(folder: Path, args: Any) -> bool:
    """Whether what the Trainer writes last, and this process last, is there and can be read."""
    try:
        json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    suffix = f"_{args.process_index}" if args.world_size > 1 else ""
    return args.save_only_model or zipfile.is_zipfile(folder / f"rng_state{suffix}.pth")
