"""From what a timm model is built again: an architecture, and the options in which the model differs from it.

timm does not write down the options that a model was created with. They are read from the model, and
those that a new one of that architecture reads differently are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from tokenprune import UnsupportedModelError
from tokenprune_timm.registry import timm_with_lvvit

_FILES = ("file", "state_dict", "url")  # where weights lay on the machine that loaded them


def identity(model: nn.Module) -> dict[str, Any]:
    """An architecture of timm's registry, or a class, with the options that make it ``model``."""
    timm = timm_with_lvvit()
    cfg: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
    name, cls = cfg.get("architecture"), type(model).__name__
    found: dict[str, Any] = {"architecture": None, "class": None, "pretrained_cfg": None, "options": {}}
    if isinstance(name, str) and timm.is_model(name):
        found["architecture"] = name
        found["pretrained_cfg"] = {k: _plain(v) for k, v in cfg.items() if k not in _FILES and _is_plain(v)}
    elif getattr(timm.models, cls, None) is type(model):
        found["class"] = cls
    else:
        raise UnsupportedModelError(f"{cls} is no class of timm's, and says no architecture that timm has.")
    while differing := _differing(model, found):
        found["options"] |= differing  # with one option, the default of another may be another
    # The number that the model says, where somebody put another layer in the place of its head.
    found["num_classes"] = getattr(model, "num_classes", None)
    return found


def _differing(model: nn.Module, found: dict[str, Any]) -> dict[str, Any]:
    """Options of ``model`` that a model built so far does not have, and that have not been tried."""
    with torch.device("meta"):
        reference = build(found)
    return {
        option: _plain(value)
        for option, read in _OPTIONS.items()
        if option not in found["options"]
        and (value := _try(read, model)) is not None
        and value != _try(read, reference)
    }


def build(identity: dict[str, Any], *, pretrained: bool = False) -> nn.Module:
    """The model that `identity` described."""
    timm = timm_with_lvvit()
    name, cls, options = identity.get("architecture"), identity.get("class"), dict(identity.get("options", {}))
    if name is None:
        make = getattr(timm.models, str(cls), None)
        if not (isinstance(make, type) and issubclass(make, nn.Module)):
            raise UnsupportedModelError(f"timm {timm.__version__} has no class {cls!r}.")
        if pretrained:
            raise UnsupportedModelError(f"{cls} was built from its class, and has no public weights.")
    else:
        if not timm.is_model(name):
            raise UnsupportedModelError(f"timm {timm.__version__} has no architecture {name!r}.")
        known = {field.name for field in fields(timm.models.PretrainedCfg)}
        cfg = {key: value for key, value in (identity.get("pretrained_cfg") or {}).items() if key in known}
        make = partial(timm.create_model, name, pretrained=pretrained, pretrained_cfg=cfg or None)
    try:
        model: nn.Module = make(**options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"timm {timm.__version__} does not build {name or cls} with {options}: {error}"
        ) from error
    if identity.get("num_classes") is not None:
        model.num_classes = identity["num_classes"]
    return model


def _has(path: str) -> Callable[[Any], bool]:
    """Whether a part is there that an option switches on."""
    return lambda model: not isinstance(attrgetter(path)(model), nn.Identity | None)


def _drop_path(model: Any) -> float:
    rates = [getattr(module, "drop_prob", None) for module in model.modules()]
    return max((float(rate) for rate in rates if isinstance(rate, (int, float))), default=0.0)


def _num_classes(model: Any) -> int:
    head = model.get_classifier()
    head = head[0] if isinstance(head, tuple) else head
    layers = [module for module in head.modules() if isinstance(module, nn.Linear)]
    return int(layers[-1].out_features) if layers else 0


def _in_chans(model: Any) -> int:
    return int(next(module for module in model.patch_embed.modules() if isinstance(module, nn.Conv2d)).in_channels)


# Where an option is read from: the path of an attribute, or a function of the model.
_OPTIONS: dict[str, str | Callable[[Any], Any]] = {
    "num_classes": _num_classes,
    "in_chans": _in_chans,
    "img_size": "patch_embed.img_size",
    "patch_size": "patch_embed.patch_size",
    "global_pool": "global_pool",
    "embed_dim": "embed_dim",
    "depth": lambda model: len(model.blocks),
    "num_heads": "blocks.0.attn.num_heads",
    "mlp_ratio": lambda model: model.blocks[0].mlp.fc1.out_features / model.embed_dim,
    "qkv_bias": lambda model: model.blocks[0].attn.qkv.bias is not None,
    "proj_bias": lambda model: model.blocks[0].attn.proj.bias is not None,
    "qk_norm": _has("blocks.0.attn.q_norm"),
    "init_values": lambda model: (
        getattr(model.blocks[0].ls1, "init_values", 1e-5) if _has("blocks.0.ls1")(model) else None
    ),
    "class_token": lambda model: model.cls_token is not None,
    "reg_tokens": "num_reg_tokens",
    "no_embed_class": "no_embed_class",
    "pos_embed": lambda model: "none" if model.pos_embed is None else "learn",
    "pre_norm": _has("norm_pre"),
    "final_norm": lambda model: _has("norm")(model) or _has("fc_norm")(model),
    "fc_norm": lambda model: _has("fc_norm")(model) or not _has("norm")(model),
    "pool_include_prefix": "pool_include_prefix",
    "dynamic_img_size": "dynamic_img_size",
    "dynamic_img_pad": "patch_embed.dynamic_img_pad",
    "drop_rate": "head_drop.p",
    "pos_drop_rate": "pos_drop.p",
    "patch_drop_rate": lambda model: getattr(model.patch_drop, "prob", 0.0),
    "proj_drop_rate": "blocks.0.attn.proj_drop.p",
    "attn_drop_rate": "blocks.0.attn.attn_drop.p",
    "drop_path_rate": _drop_path,
    "weight_init": "weight_init_mode",
    "fix_init": "fix_init",
}


def _try(read: str | Callable[[Any], Any], model: nn.Module) -> Any:
    """What an option is read as, and ``None`` in a family without such a part."""
    try:
        return (attrgetter(read) if isinstance(read, str) else read)(model)
    except (AttributeError, IndexError, StopIteration, TypeError):
        return None


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
