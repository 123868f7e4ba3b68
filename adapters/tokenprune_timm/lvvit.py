"""LV-ViT, which timm lacks, as a model of timm's: importing this module registers lvvit_t, _s, _m and _l.

All Tokens Matter: Token Labeling for Training Better Vision Transformers (arXiv 2104.10858).

Shapes: B images, P prefix tokens, N patch tokens, L = P + N, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Format, LayerNorm, PatchEmbed, nchw_to, resample_abs_pos_embed, to_2tuple
from timm.models import VisionTransformer, build_model_with_cfg, clean_state_dict, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

__all__ = ["LVViT", "checkpoint_filter_fn"]


class ConvStem(PatchEmbed):  # type: ignore[misc]
    """Patch embedding by three convolutions at half resolution, and a projection to patches.

    Takes what timm's PatchEmbed takes.

    Args:
        stem_channels: Channels of the three convolutions.

    Raises:
        ValueError: The patch size is odd: the first convolution has stride 2, the projection the rest.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        *,
        stem_channels: int = 64,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        place = {"device": device, "dtype": dtype}
        super().__init__(img_size, patch_size, in_chans, embed_dim, **options, **place)
        if any(side % 2 for side in self.patch_size):
            raise ValueError(f"patch_size={patch_size}: LV-ViT's stem halves the image first; it takes an even size.")
        del self._modules["proj"]  # it comes last, and works on fewer pixels
        self.conv1 = nn.Conv2d(in_chans, stem_channels, 7, stride=2, padding=3, bias=False, **place)
        self.bn1 = nn.BatchNorm2d(stem_channels, **place)
        self.conv2 = nn.Conv2d(stem_channels, stem_channels, 3, padding=1, bias=False, **place)
        self.bn2 = nn.BatchNorm2d(stem_channels, **place)
        self.conv3 = nn.Conv2d(stem_channels, stem_channels, 3, padding=1, bias=False, **place)
        self.bn3 = nn.BatchNorm2d(stem_channels, **place)
        kernel = tuple(side // 2 for side in self.patch_size)
        self.proj = nn.Conv2d(stem_channels, embed_dim, kernel, stride=kernel, bias=options.get("bias", True), **place)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Make the stem take images of another size.

        Raises:
            ValueError: Another patch size is asked for, which would take another projection.
        """
        if patch_size is not None and to_2tuple(patch_size) != tuple(self.patch_size):
            raise ValueError(
                f"patch_size={patch_size}: the patches of a built LV-ViT stay {self.patch_size[0]} x "
                f"{self.patch_size[1]} pixels; build one with patch_size={patch_size}."
            )
        super().set_input_size(img_size=img_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self._fit(x)
        x = F.relu(self.bn1(self.conv1(x)))  # (B, stem_channels, height / 2, width / 2)
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = self.proj(x)  # (B, C, rows, columns)
        if self.flatten:
            x = x.flatten(2).transpose(1, 2)  # (B, N, C)
        elif self.output_fmt != Format.NCHW:
            x = nchw_to(x, self.output_fmt)  # (B, rows, columns, C) where the image size is dynamic
        tokens: Tensor = self.norm(x)
        return tokens

    def _fit(self, x: Tensor) -> Tensor:
        """The images, padded where the model pads; an error where their size is not one it takes."""
        size, patch = tuple(x.shape[-2:]), self.patch_size
        if self.dynamic_img_pad:
            return F.pad(x, (0, -size[1] % patch[1], 0, -size[0] % patch[0]))
        if self.strict_img_size:
            torch._assert(size == tuple(self.img_size), f"images of {size} pixels; the model takes {self.img_size}.")
        else:
            whole = size[0] % patch[0] == 0 and size[1] % patch[1] == 0
            torch._assert(whole, f"images of {size} pixels; the model takes multiples of {patch}.")
        return x


class Divide(nn.Module):
    """Divides by a constant."""

    def __init__(self, divisor: float) -> None:
        super().__init__()
        self.divisor = divisor

    def forward(self, x: Tensor) -> Tensor:
        return x / self.divisor

    def extra_repr(self) -> str:
        return str(self.divisor)


class DividedBlock(Block):  # type: ignore[misc]
    """timm's block with each residual branch divided by a constant, in the place of its layer scale.

    Raises:
        ValueError: Layer scale is asked for as well.
    """

    def __init__(self, *args: Any, residual_divisor: float, **options: Any) -> None:
        super().__init__(*args, **options)
        if options.get("init_values"):
            raise ValueError("init_values: LV-ViT divides its residual branches by a constant; it has no layer scale.")
        self.ls1, self.ls2 = Divide(residual_divisor), Divide(residual_divisor)


class LVViT(VisionTransformer):  # type: ignore[misc]
    """A Vision Transformer whose patch tokens are classified, too.

    All Tokens Matter: Token Labeling for Training Better Vision Transformers (arXiv 2104.10858).

    The output is ``head(class token) + aux_weight · max over patch tokens of aux_head(token)``, in eval and in
    training mode: in any training loop both heads learn, and what is trained is what is evaluated. For a loss
    of its own on every patch token, as token labeling has, call ``set_token_training()``: in training mode the model
    then returns ``(class logits (B, K), token logits (B, N, K))``, as timm's distilled ViTs return two
    sets of logits after ``set_distilled_training()``. Fine-tuning with `tokenprune.DynamicViTLoss` takes neither: its
    ``heads=("head", "aux_head")`` reads both heads from the final tokens.

    Everything else is timm's: see its VisionTransformer for further arguments.

    Args:
        residual_divisor: By what every residual branch is divided.
        stem_channels: Channels of the stem's convolutions.
        aux_weight: Weight of the largest token logits in the output.
        global_pool: ``"token"``, or ``""`` for a model without classes that gives all its tokens.

    Raises:
        ValueError: Another pool: the heads read the class token and the patch tokens.
    """

    def __init__(
        self,
        *,
        residual_divisor: float = 2.0,
        stem_channels: int = 64,
        aux_weight: float = 0.5,
        global_pool: str = "token",
        mlp_ratio: float = 3.0,
        **options: Any,
    ) -> None:
        _check_pool(global_pool, options.get("num_classes", 1000))
        super().__init__(
            global_pool=global_pool,
            **{
                "mlp_ratio": mlp_ratio,
                "qkv_bias": False,
                "norm_layer": partial(LayerNorm, eps=1e-5),
                "embed_layer": partial(ConvStem, stem_channels=stem_channels),
                "block_fn": partial(DividedBlock, residual_divisor=residual_divisor),
                **options,
            },
        )
        self.aux_weight = aux_weight
        self.token_training = False
        self._add_aux_head()

    def set_token_training(self, enable: bool = True) -> None:
        """Return class and token logits apart in training mode, or, with ``False``, together again."""
        self.token_training = enable

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """The class token's head and the patch tokens'."""
        return self.head, self.aux_head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both heads by fresh ones."""
        _check_pool(self.global_pool if global_pool is None else global_pool, num_classes)
        super().reset_classifier(num_classes, global_pool)
        self._add_aux_head()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """From final tokens (B, L, C) to the output."""
        if pre_logits or self.num_classes == 0:
            return super().forward_head(x, pre_logits=pre_logits)
        class_logits: Tensor = super().forward_head(x)  # (B, K)
        token_logits: Tensor = self.aux_head(self.head_drop(x[:, self.num_prefix_tokens :]))  # (B, N, K)
        if self.training and self.token_training:
            return class_logits, token_logits
        return class_logits + self.aux_weight * token_logits.amax(dim=1)

    def _add_aux_head(self) -> None:
        parameter = self.cls_token
        head: nn.Module = nn.Identity()
        if self.num_classes > 0:
            head = nn.Linear(self.embed_dim, self.num_classes, device=parameter.device, dtype=parameter.dtype)
            self._init_weights(head)
        self.aux_head = head.train(self.training)


def _check_pool(global_pool: str, num_classes: int) -> None:
    if global_pool != "token" and (global_pool or num_classes):
        raise ValueError(
            f"global_pool={global_pool!r} with num_classes={num_classes}: LV-ViT's heads read the class token and the "
            "patch tokens; choose 'token', or '' with num_classes=0 for all tokens."
        )


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: LVViT) -> dict[str, Tensor]:
    """An official checkpoint as the model takes it: out of what it is nested in, positions resized bicubically."""
    for name in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state_dict.get(name), Mapping):
            state_dict = state_dict[name]
    state: dict[str, Tensor] = clean_state_dict(dict(state_dict))
    positions = state.get("pos_embed")
    if positions is not None and positions.shape[1] != model.pos_embed.shape[1]:
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        grid = list(model.patch_embed.grid_size)
        state["pos_embed"] = resample_abs_pos_embed(positions, grid, num_prefix_tokens=prefix)
    return state


def _cfg(crop_pct: float, size: int = 224) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.conv1",
        "classifier": ("head", "aux_head"),
        "paper_ids": "arXiv:2104.10858",
        "paper_name": "All Tokens Matter: Token Labeling for Training Better Vision Transformers",
    }


default_cfgs = generate_default_cfgs(
    {"lvvit_t": _cfg(0.9), "lvvit_s": _cfg(0.9), "lvvit_m": _cfg(1.0), "lvvit_l": _cfg(1.0, 448)}
)


def _create(variant: str, pretrained: bool, **options: Any) -> LVViT:
    model: LVViT = build_model_with_cfg(
        LVViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"},
        **options,
    )
    return model


@register_model  # type: ignore[untyped-decorator]
def lvvit_t(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-T: 12 blocks of width 240."""
    sizes = {"embed_dim": 240, "depth": 12, "num_heads": 4, "residual_divisor": 1.0}
    return _create("lvvit_t", pretrained, **{**sizes, **kwargs})


@register_model  # type: ignore[untyped-decorator]
def lvvit_s(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-S: 16 blocks of width 384."""
    sizes = {"embed_dim": 384, "depth": 16, "num_heads": 6, "residual_divisor": 2.0}
    return _create("lvvit_s", pretrained, **{**sizes, **kwargs})


@register_model  # type: ignore[untyped-decorator]
def lvvit_m(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-M: 20 blocks of width 512."""
    sizes = {"embed_dim": 512, "depth": 20, "num_heads": 8, "residual_divisor": 2.0}
    return _create("lvvit_m", pretrained, **{**sizes, **kwargs})


@register_model  # type: ignore[untyped-decorator]
def lvvit_l(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-L: 24 blocks of width 768, for images of 448 pixels."""
    sizes = {"embed_dim": 768, "depth": 24, "num_heads": 12, "residual_divisor": 3.0, "stem_channels": 128}
    return _create("lvvit_l", pretrained, **{**sizes, **kwargs})
