"""From what a torchvision `VisionTransformer` is built again: the arguments of its constructor, all on the model."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from tokenprune import UnsupportedModelError

# Arguments that the model keeps under the names they have.
_OPTIONS = (
    "image_size", "patch_size", "hidden_dim", "mlp_dim", "dropout", "attention_dropout", "representation_size",
)  # fmt: skip


def identity(model: nn.Module) -> dict[str, Any]:
    """The constructor's arguments, and what users put in the place of the head."""
    from torchvision.models import VisionTransformer

    if type(model) is not VisionTransformer:
        raise UnsupportedModelError(f"{type(model).__name__} is not torchvision's VisionTransformer.")
    found: Any = model
    layers = [module for module in found.heads.modules() if isinstance(module, nn.Linear)]
    stem = None if isinstance(found.conv_proj, nn.Conv2d) else _stem(found.conv_proj)
    return {
        "options": {
            **{name: getattr(found, name) for name in _OPTIONS},
            "num_layers": len(found.encoder.layers),
            "num_heads": found.encoder.layers[0].num_heads,
            "num_classes": layers[-1].out_features if layers else found.num_classes,
        },
        "eps": found.encoder.ln.eps,
        "stem": stem,
        # A plain layer in the place of the sequence of them, as many put one there.
        "plain_head": isinstance(found.heads, nn.Linear),
        "no_head": not layers,
        # The number that the model says, where somebody put another layer in the place of its head.
        "num_classes": found.num_classes,
    }


def build(identity: dict[str, Any], *, pretrained: bool = False) -> nn.Module:
    """The model that `identity` described."""
    from torchvision.models import VisionTransformer
    from torchvision.models.vision_transformer import ConvStemConfig

    if pretrained:
        raise UnsupportedModelError("a torchvision model does not say which public weights it came from.")
    options = dict(identity["options"])
    if identity["stem"] is not None:
        options["conv_stem_configs"] = [
            ConvStemConfig(*sizes, norm_layer=nn.BatchNorm2d, activation_layer=getattr(nn, name))
            for *sizes, name in identity["stem"]
        ]
    try:
        model: Any = VisionTransformer(**options, norm_layer=partial(nn.LayerNorm, eps=identity["eps"]))
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"torchvision does not build a VisionTransformer with {options}: {error}"
        ) from error
    if identity["plain_head"]:
        model.heads = nn.Linear(model.hidden_dim, options["num_classes"])
    elif identity["no_head"]:
        model.heads = nn.Identity()
    model.num_classes = identity["num_classes"]
    built: nn.Module = model
    return built


def _stem(stem: nn.Module) -> list[list[Any]]:
    """Channels, kernel, stride and activation of a convolutional stem's layers; the last has none and is implied."""
    layers = []
    for part in stem.children():
        convolution = next((module for module in part.modules() if isinstance(module, nn.Conv2d)), None)
        norm = any(isinstance(module, nn.BatchNorm2d) for module in part.modules())
        if convolution is not None and norm:
            activation = type(list(part.children())[-1])
            if getattr(nn, activation.__name__, None) is not activation:
                raise UnsupportedModelError(f"a stem with {activation.__name__} cannot be built again.")
            name = activation.__name__
            layers.append([convolution.out_channels, convolution.kernel_size[0], convolution.stride[0], name])
    return layers
