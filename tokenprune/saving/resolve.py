"""The MODEL of the command line: one string for a saved model or for one of a library."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from tokenprune.errors import CheckpointError, UnknownModelError
from tokenprune.saving.hub import first_line, is_repo_id, shortened
from tokenprune.saving.load import from_pretrained
from tokenprune.saving.manifest import MANIFEST
from tokenprune.saving.named import load_from_library


def load_model(name: str, *, pretrained: bool = False, image_size: tuple[int, int] | None = None) -> nn.Module:
    """The model of a name, sparsified if it was saved so.

    Looked for in this order: a folder that `save_pretrained` wrote, or a Hub repository with such files; then the
    libraries that have an adapter (see `load_from_library`), which know names, folders of their own and Hub ids.
    A folder of the working directory wins over a name, and ``library:name`` names one library.

    Args:
        name: The name.
        pretrained: Whether a library's model comes with trained weights; a saved model has those it was saved with.
        image_size: Height and width to build a library's model for; ``None`` means its own.

    Raises:
        UnknownModelError: There is none; the message lists what was tried, and names that are close.
        CheckpointError: The saved model is damaged.
        UnsupportedModelError: The library refuses.
    """
    folder, tried = Path(name), []
    try:
        is_folder = folder.is_dir()
    except OSError as error:  # a name that is too long, as a rule
        raise UnknownModelError(f"no model {shortened(name)!r}: {error.strerror}.") from error
    if is_folder:
        if (folder / MANIFEST).exists() or _has_scorers(folder):
            return from_pretrained(folder)
        tried.append(f"the folder has no {MANIFEST}")
    else:
        tried.append("there is no folder of that name")
        if is_repo_id(name):
            missing = _missing_on_hub(name)
            if missing is None:
                return from_pretrained(name)
            tried.append(missing)
    try:
        return load_from_library(name, pretrained=pretrained, image_size=image_size)
    except UnknownModelError as error:
        raise UnknownModelError(f"{error} Besides, {'; '.join(tried)}.") from error


def _has_scorers(folder: Path) -> bool:
    """Whether a library wrote a sparsified model there."""
    from safetensors import SafetensorError, safe_open

    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(str(file), framework="pt") as opened:
                if any(name.startswith("tokenprune.") for name in opened.keys()):  # noqa: SIM118
                    return True
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged or truncated, or no safetensors file ({error}).") from error
    return False


def _missing_on_hub(repo_id: str) -> str | None:
    """Why the Hub gives no manifest of that repository; ``None`` if it does."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(repo_id, MANIFEST)
    except Exception as error:  # of many kinds, depending on the version and on its HTTP library
        return f"no {MANIFEST} could be fetched from a Hub repository of that id ({first_line(error)})"
    return None
