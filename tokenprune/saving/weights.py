"""Writing tensors to safetensors files, tied ones once, and reading them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import CheckpointError

_TIES = "tokenprune.ties"


def write(file: Path, tensors: Mapping[str, Any]) -> None:
    """Write tensors to a file; one that has several names is written once.

    Raises:
        CheckpointError: Something is no tensor, has no data or a dtype that the format lacks.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    seen: dict[tuple[Any, ...], str] = {}
    ties: dict[str, str] = {}
    written: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{name} in the state dict is a {type(tensor).__name__}; only tensors can be saved without pickle."
            )
        if tensor.device.type == "meta":
            raise CheckpointError(f"{name} is on the meta device and has no data to save; load weights first.")
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and memory in seen:
            ties[name] = seen[memory]
            continue
        seen[memory] = name
        # Views into one storage are cloned, as the format requires.
        written[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    try:
        save_file(written, file, metadata={"format": "pt", _TIES: json.dumps(ties)})
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"the weights cannot be written as safetensors: {error}") from error


def read(files: Sequence[Path], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of files, on the CPU.

    Args:
        files: One, or the shards of one.
        prefix: Read only tensors whose names begin with it.

    Raises:
        CheckpointError: A file is missing, truncated or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; the saved folder is incomplete.")
        try:
            with safe_open(str(file), framework="pt") as opened:
                own = {name: opened.get_tensor(name) for name in opened.keys() if name.startswith(prefix)}  # noqa: SIM118
                ties = _ties((opened.metadata() or {}).get(_TIES, "{}"))
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{file} is damaged or truncated, or no safetensors file ({error}); save or download it again."
            ) from error
        own |= {name: own[kept] for name, kept in ties.items() if kept in own}
        tensors |= own
    return tensors


def _ties(text: str) -> dict[str, str]:
    """Names that were tied, and for each the one under which its tensor was written."""
    ties = json.loads(text)
    if not isinstance(ties, dict) or not all(isinstance(kept, str) for kept in ties.values()):
        raise ValueError(f"what it says of tied weights is {text[:40]!r}")
    return ties


def check_fit(found: Mapping[str, Tensor], expected: Mapping[str, Any], what: str, remedy: str) -> None:
    """Refuse tensors that are not, by name, shape and kind of numbers, those a model has.

    Raises:
        CheckpointError: They differ; the message names how.
    """
    lists = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in found
            if name in expected and found[name].shape != expected[name].shape
        ],
        "of another kind": [
            f"{name} {found[name].dtype} instead of {expected[name].dtype}"
            for name in found
            if name in expected and not alike(found[name], expected[name])
        ],
    }
    if any(lists.values()):
        told = "; ".join(f"{len(names)} {kind}: {shortened(names)}" for kind, names in lists.items() if names)
        raise CheckpointError(f"{what}: {told}. {remedy}")


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether both hold numbers of a kind: floating-point, complex or whole ones."""
    return all(getattr(one.dtype, kind) == getattr(other.dtype, kind) for kind in ("is_floating_point", "is_complex"))


def shortened(names: Sequence[str]) -> str:
    """The first few of a list."""
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def digest(modules: Iterable[torch.nn.Module]) -> str:
    """SHA-256 of the parameters of modules, exact to the bit."""
    sha = hashlib.sha256()
    for module in modules:
        for parameter in module.parameters():
            tensor = parameter.detach().cpu().contiguous()
            sha.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
