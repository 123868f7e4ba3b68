"""Loading models of transformers: from a folder that ``save_pretrained`` wrote, or from the Hub."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from tokenprune import UnsupportedModelError
from tokenprune_transformers.example_inputs import vision_config


def load(name: str, *, pretrained: bool = False, image_size: tuple[int, int] | None = None) -> nn.Module:
    """The model of a folder or Hub id, of the class that its config names."""
    if not Path(name).is_dir() and "/" not in name:
        raise LookupError("neither a folder nor a Hub id (owner/name)")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():  # older releases make up a config
        raise LookupError("the folder has no config.json")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # of the Hub's and the config's many kinds; each means that the model is not ours
        raise LookupError(f"no config of transformers ({str(error).strip().partition(chr(10))[0]})") from error
    if image_size is not None:
        _resize(name, config, image_size, pretrained)
    cls = _class(config)
    if not pretrained:
        try:
            made: nn.Module = cls(config)
        except Exception as error:  # configs are checked in many ways
            raise UnsupportedModelError(f"transformers cannot make {name!r}: {error}") from error
        return made
    try:
        with _without_report():
            model, info = cls.from_pretrained(name, dtype="auto", output_loading_info=True)
    except Exception as error:  # damaged files, downloads, configs that do not fit
        raise UnsupportedModelError(f"transformers cannot load {name!r}: {error}") from error
    # It would go on with random numbers in their place. What is not the model's own may be tokenprune's.
    wrong = [*info["missing_keys"], *info["mismatched_keys"], *info["error_msgs"]]
    wrong += [key for key in info["unexpected_keys"] if not key.startswith("tokenprune.")]
    if wrong:
        raise UnsupportedModelError(
            f"the weights of {name!r} do not fit {cls.__name__}: {', '.join(map(str, sorted(map(str, wrong))[:3]))} "
            "are missing, unexpected or of another shape."
        )
    loaded: nn.Module = model
    return loaded


def _class(config: Any) -> Any:
    import transformers

    named = getattr(config, "architectures", None)
    for name in named if isinstance(named, list) else ():
        cls = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    raise UnsupportedModelError(
        f"the config names no class of transformers {transformers.__version__}: architectures={named}."
    )


def _resize(name: str, config: Any, image_size: tuple[int, int], pretrained: bool) -> None:
    if pretrained:
        raise UnsupportedModelError(f"{name!r} cannot be loaded with trained weights at another image size.")
    part = vision_config(config)
    if not hasattr(part, "image_size"):
        raise UnsupportedModelError(f"the config of {name!r} has no image_size to set.")
    square = image_size[0] == image_size[1] and isinstance(part.image_size, int)
    part.image_size = image_size[0] if square else image_size


@contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' table of tensors that it does not know, which are tokenprune's and checked here."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
