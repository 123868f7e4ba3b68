"""From what a model of transformers is built again: its class and its config."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from tokenprune import UnsupportedModelError

_OWN = "transformers.models."  # nothing outside of it is imported because a file says so


def identity(model: nn.Module) -> dict[str, Any]:
    """A class of transformers and its config."""
    import transformers

    name = type(model).__name__
    if getattr(transformers, name, None) is not type(model):  # some towers are known in their own files alone
        name = f"{type(model).__module__}.{name}"
    if not isinstance(model, transformers.PreTrainedModel) or _model_class(name) is not type(model):
        raise UnsupportedModelError(f"{name} is not one of transformers' own models.")
    config: Any = model.config
    fields = json.loads(config.to_json_string(use_diff=False))
    # A folder on the machine that loaded it would mean nothing elsewhere.
    origin = str(fields.pop("_name_or_path", None) or getattr(config, "_name_or_path", None) or "")
    public = origin.count("/") == 1 and not origin.startswith((".", "/", "~")) and not Path(origin).exists()
    return {"class": name, "config": fields, "hub_id": origin if public else None}


def build(identity: dict[str, Any], *, pretrained: bool = False) -> nn.Module:
    """The model that `identity` described."""
    import transformers

    cls = _model_class(str(identity.get("class")))
    hub_id = identity.get("hub_id")
    if pretrained and hub_id is None:
        raise UnsupportedModelError(f"the {cls.__name__} was not loaded from the Hub, and has no public weights.")
    try:
        config = cls.config_class.from_dict(dict(identity["config"]))
        config._name_or_path = hub_id or ""
        model: nn.Module = cls.from_pretrained(hub_id, config=config, dtype="auto") if pretrained else cls(config)
    except Exception as error:  # configs check themselves in many ways, and downloads fail in others
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} does not build this {cls.__name__}: {error}"
        ) from error
    return model


def _model_class(name: str) -> Any:
    import transformers

    file, _, name_there = name.rpartition(".")
    if file.startswith(_OWN):
        try:
            cls = getattr(import_module(file), name_there, None)
        except ModuleNotFoundError:
            cls = None
    else:
        cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise UnsupportedModelError(f"transformers {transformers.__version__} has no model {name!r}.")
    return cls
