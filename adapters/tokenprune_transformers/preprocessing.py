"""How images become the input of a transformers model: by its image processor, saved beside it or of its family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from tokenprune import Preprocessing, UnsupportedModelError
from tokenprune_transformers.example_inputs import image_size, pair, vision_config

_FILES = ("preprocessor_config.json", "processor_config.json")


def preprocessing(model: nn.Module) -> Preprocessing:
    """As the image processor in the folder or repository that the model was loaded from does it.

    Where there is none, the one that transformers has for the family, at the size the model was built for.
    """
    config: Any = model.config
    own = image_size(model, vision_config(config))
    saved = _saved_processor(getattr(config, "_name_or_path", None) or "")
    if saved is not None:
        return _described(model, saved, own)
    usual = _described(model, _usual_processor(model), own)
    box = usual.resize or usual.size
    scaled = round(box[0] * own[0] / usual.size[0]), round(box[1] * own[1] / usual.size[1])
    return replace(usual, size=own, resize=scaled)


def _saved_processor(name: str) -> dict[str, Any] | None:
    from transformers import AutoImageProcessor

    folder = Path(name)
    if not name or (folder.is_dir() and not any((folder / file).is_file() for file in _FILES)):
        return None
    try:
        fields: dict[str, Any] = AutoImageProcessor.from_pretrained(name).to_dict()
    except (OSError, ValueError, ImportError):  # no such repository, none for images, or out of reach
        return None
    return fields


def _usual_processor(model: nn.Module) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    family = str(vision_config(model.config).model_type)
    # A vision tower by itself has the processor of the model that it is a part of.
    for name in (family, family.removesuffix("_vision_model"), family.removesuffix("_model").removesuffix("_vision")):
        try:
            found = IMAGE_PROCESSOR_MAPPING[CONFIG_MAPPING[name]]
        except KeyError:
            continue
        # From transformers 5 on by backend; before, the plain one and the fast one.
        for cls in found.values() if isinstance(found, dict) else found:
            try:
                fields: dict[str, Any] = cls().to_dict()
            except (ImportError, TypeError):  # for a backend that is not installed, or no class at all
                continue
            return fields
    raise UnsupportedModelError(
        f"{type(model).__name__} was loaded from nowhere that has an image processor, and transformers has none for "
        f"{family!r}; pass preprocessing=tokenprune.Preprocessing(size=…, mean=…, std=…)."
    )


def _described(model: nn.Module, fields: dict[str, Any], own: tuple[int, int]) -> Preprocessing:
    """What a processor's settings say, for a model of an own size."""
    from PIL import Image

    size, crop = _box(fields, "size", "do_resize"), _box(fields, "crop_size", "do_center_crop")
    if isinstance(size, str) or isinstance(crop, str):
        raise UnsupportedModelError(
            f"{fields.get('image_processor_type')} of {type(model).__name__} makes images of {size or crop}, and not "
            "one of a fixed size; pass preprocessing=tokenprune.Preprocessing(size=…, mean=…, std=…)."
        )
    squashed = "shortest_edge" not in (fields.get("size") or {})
    fit: Literal["squash", "cover"] = "squash" if squashed and size is not None else "cover"
    final = crop or (size if squashed and size is not None else own)
    # The model's numbers go by pixels · factor; ours by pixels from 0 to 1.
    factor = float(fields.get("rescale_factor") or 1 / 255) * 255 if fields.get("do_rescale", True) else 255.0
    mean, std = [0.0] * 3, [1.0] * 3
    if fields.get("do_normalize", True) and fields.get("image_mean") is not None:
        mean, std = _channels(fields["image_mean"]), _channels(fields["image_std"])
    resample = fields.get("resample")
    interpolation: Any = Image.Resampling(2 if resample is None else int(resample)).name.lower()
    return Preprocessing(
        size=final,
        mean=tuple(value / factor for value in mean),
        std=tuple(value / factor for value in std),
        resize=size or final,
        fit=fit,
        interpolation=interpolation,
    )


def _channels(numbers: Any) -> list[float]:
    return [float(numbers)] * 3 if isinstance(numbers, (int, float)) else [float(number) for number in numbers]


def _box(fields: dict[str, Any], name: str, switch: str) -> tuple[int, int] | str | None:
    """Height and width; in words if they differ from picture to picture; ``None`` if it is switched off."""
    box = fields.get(name)
    if not fields.get(switch, box is not None) or box is None:
        return None
    if isinstance(box, (int, float, list, tuple)):
        return pair(box)
    if box.get("height") and box.get("width"):
        return int(box["height"]), int(box["width"])
    if box.get("shortest_edge") and not box.get("longest_edge"):
        return pair(box["shortest_edge"])
    return f"{name}={box}"
