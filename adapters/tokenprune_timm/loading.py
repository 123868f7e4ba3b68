"""Loading timm's models by name: of its registry, of a folder that it wrote, or of the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from tokenprune import UnsupportedModelError
from tokenprune_timm.registry import timm_with_lvvit


def load(name: str, *, pretrained: bool = False, image_size: tuple[int, int] | None = None) -> nn.Module:
    """The model of a name."""
    timm = timm_with_lvvit()
    if Path(name).is_dir():
        _check_config(Path(name) / "config.json")
        source = f"local-dir:{name}"
    elif "/" in name:
        _check_config(_config_on_hub(name))
        source = f"hf-hub:{name}"
    elif timm.is_model(name.partition(".")[0]):
        source = name
    else:
        raise LookupError("no model of that name")
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        model: nn.Module = timm.create_model(source, pretrained=pretrained, **options)
    except Exception as error:  # whatever a constructor or a download raises
        size = f" at {image_size[0]} × {image_size[1]}" if image_size else ""
        raise UnsupportedModelError(f"timm cannot make {name!r}{size}: {error}") from error
    return model


def names() -> list[str]:
    """The Vision Transformers and others of timm's registry."""
    return list(timm_with_lvvit().list_models())


def _config_on_hub(repo_id: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, "config.json"))
    except Exception as error:  # of the Hub's many kinds, each of which means that there is no such model for us
        raise LookupError(
            f"no config.json could be fetched from the Hub ({str(error).partition(chr(10))[0]})"
        ) from error


def _check_config(file: Path) -> None:
    """That a file is there and is timm's."""
    if not file.is_file():
        raise LookupError("the folder has no config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LookupError(f"its config.json is damaged ({error})") from error
    if not isinstance(config, dict) or "architecture" not in config:
        raise LookupError("its config.json names no timm architecture")
