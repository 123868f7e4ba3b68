"""Reading the weights of any checkpoint, without ever running code from it."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import CheckpointError

# What training scripts nest weights under. Averaged weights come first, as in timm.
_NESTS = ("state_dict_ema", "model_ema", "state_dict", "model")
# What wrappers of a model put in front of the names of its weights.
_PREFIXES = ("module.", "_orig_mod.")


def read_state(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict in a checkpoint, out of what it is nested in and without the prefixes of wrappers.

    Args:
        source: A PyTorch or safetensors file, or what was loaded from one.

    Raises:
        CheckpointError: It cannot be read, would run code, or holds no state dict.
        FileNotFoundError: There is no such file.
    """
    if isinstance(source, Mapping):
        return _state(source, "the mapping")
    path = Path(source)
    name = f"the file {path.name}"
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; pass the checkpoint file in it.")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}.")
    with path.open("rb"):  # an error of the operating system is raised as such, not as a damaged file
        pass
    return _state(_safetensors(path) if path.suffix == ".safetensors" else _pickled(path), name)


def _safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(_unreadable(path, error)) from error


def _pickled(path: Path) -> Any:
    try:
        # Training scripts save their arguments beside the weights; a namespace of them is as harmless as a dict.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files end in errors of many kinds
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code is None:
            raise CheckpointError(_unreadable(path, error)) from error
        raise CheckpointError(
            f"the file {path.name} holds Python objects besides tensors ({code[1]}), and unpickling those can run any "
            "code; it was not loaded. If you trust where it comes from, load it yourself and pass its state dict."
        ) from error


def _unreadable(path: Path, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0][:120] or "it ends too early"
    return (
        f"the file {path.name} ({path.stat().st_size} bytes) cannot be read; it is truncated or damaged, or neither a "
        f"PyTorch nor a .safetensors file ({type(error).__name__}: {reason}). Fetch it again and compare its size."
    )


def _state(loaded: Any, name: str) -> dict[str, Tensor]:
    """The state dict in what was loaded."""
    while isinstance(loaded, Mapping):
        nested = next((loaded[nest] for nest in _NESTS if isinstance(loaded.get(nest), Mapping)), None)
        if nested is None:
            break
        loaded = nested
    if not isinstance(loaded, Mapping) or not any(isinstance(value, Tensor) for value in loaded.values()):
        held = f"the keys {sorted(map(str, loaded))[:8]}" if isinstance(loaded, Mapping) else type(loaded).__name__
        raise CheckpointError(
            f"{name} holds {held} and no state dict; expected one, or a mapping with one under {', '.join(_NESTS)}."
        )
    others = sorted(str(key) for key, value in loaded.items() if not isinstance(value, Tensor))
    if others:
        raise CheckpointError(f"{name} holds a state dict with other things than tensors.", unexpected=others)
    state = {str(key): value for key, value in loaded.items()}
    while prefix := next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state
