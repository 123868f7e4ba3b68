"""Real model classes of the supported libraries, built from configs at a small size.

Every parameter is drawn anew, so that zero-initialised tables, scales and tokens hide nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from timm.layers import DiffAttention
from timm.models import VisionTransformer, VisionTransformerDistilled
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from tokenprune_timm.lvvit import LVViT
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionVisionTransformer

import tokenprune

IMAGE_SIZE, PATCH_SIZE, EMBED_DIM, DEPTH = 48, 8, 32, 6
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
STAGES, KEEP_RATIO = (2, 4), 0.6


def hook_counts(model: nn.Module) -> list[int]:
    """How many hooks of each kind every module of a model has, and whether a ``forward`` of its own."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
             "_forward_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks")  # fmt: skip
    counts = [len(getattr(module, name)) for module in model.modules() for name in names]
    return counts + ["forward" in vars(module) for module in model.modules()]


@dataclass(frozen=True)
class Case:
    """A model class in one of its forms.

    Attributes:
        name: What the tests call it.
        build: Makes the model.
        num_prefix_tokens: Class, distillation and register tokens.
        image_size: Height and width of the images it is given.
        forward_arguments: What else its forward is given.
    """

    name: str
    build: Callable[[], nn.Module]
    num_prefix_tokens: int
    image_size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)
    forward_arguments: dict[str, Any] = field(default_factory=dict)

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A fresh model in eval mode, the same weights every time."""
        generator = torch.Generator().manual_seed(7)
        model = self.build().to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
        return model

    def sparsified(self, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
        """The same model sparsified, its scorers drawn wide, so that rounding does not decide between tokens."""
        model = tokenprune.sparsify(self.model(dtype), STAGES, KEEP_RATIO, **options)
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for parameter in model.tokenprune.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
        return model

    def images(self, batch: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(8)
        return torch.randn(batch, 3, *self.image_size, generator=generator, dtype=dtype)

    def run(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """Every output tensor that does not have one entry a token, by name."""
        output = model(images, **self.forward_arguments)
        if isinstance(output, Tensor):
            return {"output": output}
        if isinstance(output, tuple):
            return {str(index): value for index, value in enumerate(output)}
        named = {name: value for name, value in output.items() if isinstance(value, Tensor)}
        hidden = named.pop("last_hidden_state", None)
        if hidden is not None and self.num_prefix_tokens:
            named["prefix tokens"] = hidden[:, : self.num_prefix_tokens]
        return named

    @property
    def num_patches(self) -> int:
        return (self.image_size[0] // PATCH_SIZE) * (self.image_size[1] // PATCH_SIZE)

    def __str__(self) -> str:
        return self.name


def _timm(cls: type[nn.Module] = VisionTransformer, **options: Any) -> Callable[[], nn.Module]:
    sizes = {
        "img_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "embed_dim": EMBED_DIM,
        "depth": DEPTH,
        "num_heads": 2,
        "num_classes": 7,
    }
    return lambda: cls(**{**sizes, **options})


def _lvvit() -> nn.Module:
    model = _timm(LVViT, stem_channels=8)()
    for norm in (model.patch_embed.bn1, model.patch_embed.bn2, model.patch_embed.bn3):
        norm.running_var.fill_(0.04)  # no parameter: next to 1, redrawn weights let next to nothing of an image through
    return model


def _transformers(name: str, config_name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        sizes = {
            "hidden_size": EMBED_DIM,
            "intermediate_size": 64,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            **options,
        }
        if config_name in ("CLIPConfig", "SiglipConfig"):
            text = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 8)
            text |= dict.fromkeys(("num_hidden_layers", "num_attention_heads", "bos_token_id", "eos_token_id"), 1)
            config = getattr(transformers, config_name)(vision_config=sizes, text_config=text, num_labels=7)
        else:
            labels = {"num_labels": 7} if "Classification" in name else {}
            config = getattr(transformers, config_name)(**sizes, **labels)
        return getattr(transformers, name)(config)

    return build


TIMM = [
    Case("timm class token", _timm(), 1),
    Case("timm distilled", _timm(VisionTransformerDistilled), 2),
    Case(
        "timm registers, layer scale, q/k norm, no class position",
        _timm(reg_tokens=4, init_values=0.5, qk_norm=True, no_embed_class=True),
        5,
    ),
    Case("timm no class token, average", _timm(class_token=False, global_pool="avg"), 0),
    Case("timm class token, average, final norm kept", _timm(global_pool="avg", final_norm=True, fc_norm=False), 1),
    Case("timm registers alone, average", _timm(class_token=False, reg_tokens=4, global_pool="avg"), 4),
    Case("timm registers, average with prefix", _timm(reg_tokens=2, global_pool="avg", pool_include_prefix=True), 3),
    Case("timm average and maximum", _timm(global_pool="avgmax"), 1),
    Case("timm maximum", _timm(global_pool="max"), 1),
    Case("timm attention pool", _timm(class_token=False, global_pool="map"), 0),
    Case("timm attention pool without prefix", _timm(reg_tokens=2, global_pool="map", pool_include_prefix=False), 3),
    Case("timm attention pool with prefix", _timm(reg_tokens=2, global_pool="map", pool_include_prefix=True), 3),
    Case("timm refinement pool", _timm(class_token=False, global_pool="prr"), 0),
    Case("timm no pool", _timm(global_pool="token", num_classes=0, pre_norm=True, final_norm=False), 1),
    Case("timm post-norm blocks", _timm(block_fn=ResPostBlock), 1),
    Case("timm parallel scaling blocks", _timm(block_fn=ParallelScalingBlock), 1),
    Case("timm parallel things blocks", _timm(block_fn=ParallelThingsBlock), 1),
    Case("timm differential parallel blocks", _timm(block_fn=DiffParallelScalingBlock), 1),
    Case("timm differential attention", _timm(attn_layer=DiffAttention), 1),
    Case("timm LV-ViT", _lvvit, 1),
    Case("timm non-square, dynamic size", _timm(dynamic_img_size=True), 1, image_size=(32, 64)),
]
TRANSFORMERS = [
    Case("transformers ViT", _transformers("ViTModel", "ViTConfig"), 1),
    Case("transformers ViT classifier", _transformers("ViTForImageClassification", "ViTConfig"), 1),
    Case(
        "transformers ViT, other size",
        _transformers("ViTForImageClassification", "ViTConfig"),
        1,
        image_size=(32, 64),
        forward_arguments={"interpolate_pos_encoding": True},
    ),
    Case("transformers DeiT", _transformers("DeiTModel", "DeiTConfig"), 2),
    Case("transformers DeiT classifier", _transformers("DeiTForImageClassification", "DeiTConfig"), 2),
    Case("transformers DeiT with teacher", _transformers("DeiTForImageClassificationWithTeacher", "DeiTConfig"), 2),
    Case("transformers DINOv2", _transformers("Dinov2Model", "Dinov2Config"), 1),
    Case("transformers DINOv2 classifier", _transformers("Dinov2ForImageClassification", "Dinov2Config"), 1),
    Case("transformers DINOv2 registers", _transformers("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"), 5),
    Case(
        "transformers DINOv2 registers classifier",
        _transformers("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig"),
        5,
    ),
    Case("transformers CLIP", _transformers("CLIPVisionModel", "CLIPVisionConfig"), 1),
    Case("transformers CLIP projection", _transformers("CLIPVisionModelWithProjection", "CLIPVisionConfig"), 1),
    Case("transformers CLIP classifier", _transformers("CLIPForImageClassification", "CLIPConfig"), 1),
    Case("transformers SigLIP", _transformers("SiglipVisionModel", "SiglipVisionConfig"), 0),
    Case("transformers SigLIP classifier", _transformers("SiglipForImageClassification", "SiglipConfig"), 0),
]
TORCHVISION = [
    Case("torchvision",
         lambda: TorchvisionVisionTransformer(image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, num_layers=DEPTH,
                                              num_heads=2, hidden_dim=EMBED_DIM, mlp_dim=64, num_classes=7), 1),
]  # fmt: skip
ALL = TIMM + TRANSFORMERS + TORCHVISION
BY_NAME = {case.name: case for case in ALL}

every_model = pytest.mark.parametrize("case", ALL, ids=str)


def models(*names: str) -> pytest.MarkDecorator:
    """The models of these names, one test each."""
    return pytest.mark.parametrize("case", [BY_NAME[name] for name in names], ids=str)


# One for each way in which a library runs its blocks, for what does not depend on heads and pools.
ONE_OF_EACH_KIND = ("timm class token", "timm no class token, average", "transformers ViT classifier",
                    "transformers SigLIP", "torchvision")  # fmt: skip
some_models = models(*ONE_OF_EACH_KIND)
# Compiling takes seconds: one model, and the others among the slow tests.
compiled_models = pytest.mark.parametrize(
    "case",
    [
        pytest.param(BY_NAME[name], marks=[] if name == "timm class token" else pytest.mark.slow)
        for name in ONE_OF_EACH_KIND
    ],
    ids=str,
)


def wide_scorers(model: nn.Module) -> nn.Module:
    """Scores far apart, so that rounding does not decide between tokens."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.tokenprune.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model
