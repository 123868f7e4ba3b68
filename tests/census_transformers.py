"""Vision model classes of transformers, built from configs at a small size, with all that their forward asks for.

A class that the installed version does not have is left out of the lists.

Legend: B images, T tokens of a packed batch.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.census import Entry

IMAGE_SIZE, PATCH_SIZE, DEPTH = 48, 8, 4
GRID = IMAGE_SIZE // PATCH_SIZE
NUM_PATCHES, PATCH_VALUES = GRID**2, 3 * PATCH_SIZE**2
IMAGE_TOKEN = 40

# Every config gets those of these that it knows, and so does every config inside it.
SIZES = {
    **dict.fromkeys(("hidden_size", "embed_dim", "decoder_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "mlp_dim", "decoder_intermediate_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "depth"), DEPTH),
    **dict.fromkeys(("num_attention_heads", "num_heads", "attention_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("decoder_num_hidden_layers", "decoder_num_attention_heads"), 2),
    **dict.fromkeys(("head_dim", "projection_dim"), 16), **dict.fromkeys(("patch_size", "encoder_stride"), PATCH_SIZE),
    "image_size": IMAGE_SIZE, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# No text part is as deep as a vision tower, nor is any other part that does not look at the image first.
OTHER_SIZES = SIZES | {"num_hidden_layers": 2}
NAMES_OF_OTHERS = ("text_config", "decoder", "qformer_config", "perceiver_config", "multimodal_config")

# Height and width in patches of the images of a batch: two merged, three pooled, or neither.
GRIDS = {
    1: ((6, 6), (4, 6), (6, 3), (5, 5), (3, 4)),
    2: ((6, 6), (4, 6), (6, 2), (2, 4)),
    3: ((6, 6), (3, 6), (6, 3), (3, 3)),
}

Inputs = Callable[[int, torch.Generator], dict[str, Any]]


def grids(batch: int, multiple: int = 1) -> list[tuple[int, int]]:
    """The images' heights and widths in patches, multiples of a number."""
    return list(itertools.islice(itertools.cycle(GRIDS[multiple]), batch))


def draw(**shapes: tuple[int, ...]) -> Inputs:
    """Random values of these shapes, the batch dimension left out."""
    return lambda batch, generator: {name: torch.randn(batch, *s, generator=generator) for name, s in shapes.items()}


def each(**values: Any) -> Inputs:
    """The same values for every image."""
    return lambda batch, _: {name: torch.tensor([value] * batch) for name, value in values.items()}


def both(*parts: Inputs) -> Inputs:
    """The inputs of all parts."""
    return lambda batch, generator: {name: value for part in parts for name, value in part(batch, generator).items()}


def hidden(batch: int, generator: torch.Generator) -> dict[str, Any]:
    """A mask of patches, other ones in each image, equally many."""
    ranks = torch.rand(batch, NUM_PATCHES, generator=generator).argsort(1).argsort(1)
    return {"bool_masked_pos": ranks < NUM_PATCHES // 4}


def padded(mask: str = "", cell: int = 1, sizes: str = "", images: int = 0) -> Inputs:
    """Images of different sizes at the upper left of squares, noise in the rest.

    Args:
        mask: The name of a mask of what belongs to the images.
        cell: The height and width of a patch in that mask.
        sizes: The name of the images' sizes in pixels.
        images: How many images each element of the batch has; 0 for one, without a dimension for it.
    """

    def make(batch: int, generator: torch.Generator) -> dict[str, Any]:
        lead = (batch, images) if images else (batch,)
        shapes = torch.tensor(grids(batch * max(images, 1), 2 if sizes else 1))
        made = {"pixel_values": torch.randn(*lead, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)}
        if mask:
            inside = torch.arange(GRID * cell) < (shapes * cell)[..., None]  # (B, 2, height or width)
            made[mask] = (inside[:, 0, :, None] & inside[:, 1, None]).unflatten(0, lead)
        return made | ({sizes: shapes * PATCH_SIZE} if sizes else {})

    return make


def naflex(batch: int, generator: torch.Generator) -> dict[str, Any]:
    """The patches of images of different sizes as rows of one length, noise in the rest."""
    shapes = torch.tensor(grids(batch, 2))
    return {
        "pixel_values": torch.randn(batch, NUM_PATCHES, PATCH_VALUES, generator=generator),
        "pixel_attention_mask": torch.arange(NUM_PATCHES) < shapes.prod(1, keepdim=True),
        "spatial_shapes": shapes,
    }


def placed(batch: int, generator: torch.Generator) -> dict[str, Any]:
    """The same with the column and the row of each patch, -1 in the rest."""
    places = torch.full((batch, NUM_PATCHES, 2), -1)
    for row, (height, width) in zip(places, grids(batch, 3), strict=True):
        row[: height * width] = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(1)
    values = torch.randn(batch, NUM_PATCHES, PATCH_VALUES, generator=generator)
    return {"pixel_values": values, "pixel_position_ids": places}


def packed(
    name: str = "hidden_states",
    sizes: str = "grid_thw",
    shape: Callable[[int], tuple[int, ...]] = lambda total: (total, 2 * PATCH_VALUES),
) -> Inputs:
    """The patches of images of different sizes one after the other, in a shape made from T, and those sizes."""

    def make(batch: int, generator: torch.Generator) -> dict[str, Any]:
        shapes = torch.tensor(grids(batch, 2))
        drawn = torch.randn(shape(int(shapes.prod(1).sum())), generator=generator)
        if "thw" in sizes:
            return {name: drawn, sizes: torch.cat([torch.ones(batch, 1, dtype=torch.long), shapes], 1)}
        return {name: drawn, sizes: shapes}

    return make


def areas(divisor: int = 1) -> Callable[[int], list[int]]:
    """How many tokens the images of different sizes become, given how many patches become one."""
    return lambda batch: [height * width // divisor for height, width in grids(batch, 2)]


def prompt(num_image_tokens: int | Callable[[int], list[int]] = 0, places: str = "", prefix: str = "") -> Inputs:
    """Words, other ones for each image, and among them the places of the image, whose mask may have a name."""

    def make(batch: int, generator: torch.Generator) -> dict[str, Any]:
        counts = num_image_tokens(batch) if callable(num_image_tokens) else [num_image_tokens] * batch
        words = torch.randint(3, IMAGE_TOKEN, (batch, 6), generator=generator)
        tokens = torch.zeros(batch, 6 + max(counts), dtype=torch.long)
        for row, count in enumerate(counts):
            image = torch.full((count,), IMAGE_TOKEN)
            tokens[row, : 6 + count] = torch.cat([words[row, :2], image, words[row, 2:]])
        made = {f"{prefix}input_ids": tokens, f"{prefix}attention_mask": (tokens != 0).long()}
        return made | ({places: tokens == IMAGE_TOKEN} if places else {})

    return make


SQUARE = (IMAGE_SIZE, IMAGE_SIZE)
IMAGES = draw(pixel_values=(3, *SQUARE))
WORDS = both(IMAGES, prompt())
NOISED = both(IMAGES, draw(noise=(NUM_PATCHES,)))
VIDEO_SIZES: dict[str, Any] = {"image_size": 24, "num_frames": 8, "tubelet_size": 2}  # 4 x 3 x 3 patches
VIDEOS, CLIPS = draw(pixel_values=(8, 3, 24, 24)), draw(pixel_values_videos=(8, 3, 24, 24))
JEPA: dict[str, Any] = {"frames_per_clip": 8, "crop_size": 24, "num_pooler_layers": 1, "pred_hidden_size": 32}
JEPA |= dict.fromkeys(("pred_num_attention_heads", "pred_num_hidden_layers"), 2)
TIMM = {"img_size": SQUARE, "patch_size": PATCH_SIZE, "embed_dim": 32, "depth": DEPTH, "num_heads": 2}
SAPIENS: dict[str, Any] = dict.fromkeys(("num_first_full_attention_layers", "num_last_full_attention_layers"), 1)
SAPIENS["num_key_value_attention_heads"] = 1
LLAMA4: dict[str, Any] = {"intermediate_size": 128, "projector_input_dim": 32, "projector_output_dim": 32}
MLLAMA: dict[str, Any] = {"max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
MLLAMA |= {"num_global_layers": 2, "intermediate_layers_indices": [1, 2], "vision_output_dim": 96}


def mllama_tiles(batch: int, generator: torch.Generator) -> dict[str, Any]:
    """Images of two tiles, every second one of a single tile, noise in the other."""
    single = torch.arange(batch) % 2
    return {
        "pixel_values": torch.randn(batch, 1, 2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        "aspect_ratio_ids": (2 - single)[:, None],
        "aspect_ratio_mask": torch.stack([torch.ones_like(single), 1 - single], 1)[:, None],
    }


@cache
def modules_of(family: str) -> dict[str, str]:
    """The classes of a model folder, and the modules where they are."""
    folder = Path(transformers.__file__).parent / "models" / family
    return {
        name: f"transformers.models.{family}.{file.stem}"
        for file in sorted(folder.glob("modeling_*.py"))
        for name in re.findall(r"^class (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }


def sizes_of(config: type[PretrainedConfig], known: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The small sizes of a config and of those inside it, as arguments, what is given put over them."""
    names = inspect.signature(config.__init__).parameters
    sizes = {name: value for name, value in known.items() if name in names} | given
    inside = config.sub_configs if isinstance(config.sub_configs, dict) else {}
    for name in inside.keys() | {name for name, value in given.items() if isinstance(value, dict) and name in names}:
        own = given.get(name, {})
        inner = CONFIG_MAPPING[own["model_type"]] if "model_type" in own else inside.get(name)
        inner = type(getattr(config(), name)) if inner is AutoConfig else inner
        if inner not in (None, type(None)):
            sizes[name] = sizes_of(inner, OTHER_SIZES if name in NAMES_OF_OTHERS else SIZES, own)
    return sizes


def build(family: str, name: str, given: dict[str, Any]) -> nn.Module:
    """The model of a class."""
    cls = getattr(importlib.import_module(modules_of(family)[name]), name)
    # What a part of a model takes is not the config of all of it.
    taken = next(iter(inspect.signature(cls).parameters.values())).annotation
    config = taken if inspect.isclass(taken) and issubclass(taken, PretrainedConfig) else cls.config_class
    return cls(config(num_labels=7, **sizes_of(config, SIZES, given)))


def rows(names: str, inputs: Inputs = IMAGES, **given: Any) -> Iterator[Entry]:
    """The classes that take the same config and inputs; of the names, each family stands before its classes."""
    family = ""
    for name in names.split():
        if name.islower():
            family = name
        elif name in modules_of(family):
            made = partial(build, family, name, given)
            yield Entry(library="transformers", family=family, name=name, build=made, inputs=inputs)


def supported() -> list[Entry]:
    """Classes that differ in nothing, or in little, from a list of blocks."""
    beit = {"use_mask_token": True, "use_shared_relative_position_bias": True}
    mgp = {"max_token_length": 5, "num_character_labels": 7, "num_bpe_labels": 11, "num_wordpiece_labels": 13}
    masked = both(IMAGES, hidden)
    return [
        *rows("aimv2 Aimv2VisionModel altclip AltCLIPVisionModel blip BlipVisionModel blip_2 Blip2VisionModel "
              "chinese_clip ChineseCLIPVisionModel "
              "clip CLIPVisionModel CLIPVisionModelWithProjection CLIPForImageClassification "
              "deit DeiTModel DeiTForImageClassification DeiTForImageClassificationWithTeacher "
              "clipseg CLIPSegVisionModel dinov2 Dinov2Model Dinov2ForImageClassification "
              "dinov2_with_registers Dinov2WithRegistersModel Dinov2WithRegistersForImageClassification "
              "flava FlavaImageModel git GitVisionModel ijepa IJepaModel IJepaForImageClassification "
              "instructblip InstructBlipVisionModel instructblipvideo InstructBlipVideoVisionModel "
              "internvl InternVLVisionModel janus JanusVisionModel kosmos2 Kosmos2VisionTransformer Kosmos2VisionModel "
              "metaclip_2 MetaClip2VisionModel MetaClip2VisionModelWithProjection MetaClip2ForImageClassification "
              "ovis2 Ovis2VisionModel owlv2 Owlv2VisionTransformer Owlv2VisionModel "
              "owlvit OwlViTVisionTransformer OwlViTVisionModel pixio PixioModel qianfan_ocr QianfanOCRVisionModel "
              "siglip SiglipVisionModel SiglipForImageClassification tipsv2 Tipsv2VisionModel "
              "vit ViTModel ViTForImageClassification vit_msn ViTMSNModel ViTMSNForImageClassification"),
        *rows("audio_spectrogram_transformer ASTModel ASTForAudioClassification", draw(input_values=(72, 32)),
              max_length=72, num_mel_bins=32, frequency_stride=8, time_stride=8),
        *rows("beit BeitModel BeitForImageClassification", **beit),
        *rows("beit BeitForMaskedImageModeling", masked, **beit),
        *rows("data2vec Data2VecVisionModel Data2VecVisionForImageClassification", use_relative_position_bias=True),
        *rows("deit DeiTForMaskedImageModeling vit ViTForMaskedImageModeling", masked),
        *rows("dinov3_vit DINOv3ViTModel", num_register_tokens=4),
        *rows("dpt DPTModel", backbone_out_indices=(0, 1, 2, 3)),
        *rows("gemma4 Gemma4VisionModel", placed, position_embedding_size=16),
        *rows("idefics2 Idefics2VisionTransformer idefics3 Idefics3VisionTransformer smolvlm SmolVLMVisionTransformer",
              padded("patch_attention_mask")),
        *rows("mgp_str MgpstrModel MgpstrForSceneTextRecognition", image_size=SQUARE, **mgp),
        *rows("phi4_multimodal Phi4MultimodalVisionModel", padded("patch_attention_mask"), crop_size=IMAGE_SIZE),
        *rows("pixtral PixtralVisionModel", padded(sizes="image_sizes")),
        *rows("radio RadioModel", max_img_size=IMAGE_SIZE),
        *rows("sapiens2 Sapiens2Model", **SAPIENS),
        *rows("siglip2 Siglip2VisionModel Siglip2ForImageClassification", naflex, num_patches=NUM_PATCHES,
              vision_config={"num_patches": NUM_PATCHES}),
        *rows("timm_wrapper TimmWrapperForImageClassification", architecture="vit_tiny_patch16_224", model_args=TIMM),
        *rows("videomae VideoMAEModel VideoMAEForVideoClassification", VIDEOS, **VIDEO_SIZES),
        *rows("vit_mae ViTMAEModel", NOISED, mask_ratio=0.25),
        *rows("vitpose_backbone VitPoseBackbone", image_size=SQUARE, patch_size=(8, 8)),
        *rows("vivit VivitModel VivitForVideoClassification", VIDEOS, **VIDEO_SIZES | {"tubelet_size": (2, 8, 8)}),
        *rows("vjepa2 VJEPA2Model", both(CLIPS, lambda *_: {"skip_predictor": True}), **JEPA),
        *rows("vjepa2 VJEPA2ForVideoClassification", CLIPS, **JEPA),
    ]  # fmt: skip


def uncovered() -> list[Entry]:
    """Classes that attend globally in flat lists of blocks, and are odd in one way or another."""
    stages, every = {"out_indices": [2, 4]}, {"out_indices": [1, 2, 3, 4]}
    tokens = {**every, "reshape_hidden_states": False}
    dino = {"model_type": "dinov2", **tokens}
    dense = {"neck_hidden_sizes": (8, 8, 8, 8), "fusion_hidden_size": 8, "reassemble_factors": (4, 2, 1, 0.5)}
    small = {"pool_scales": (1, 2), "auxiliary_channels": 8}
    head = {"upsample_out_channels": [8], "conv_out_channels": [8], "scale_conv_out_channels": [4]}
    pose = {"model_type": "vitpose_backbone", "image_size": SQUARE, "patch_size": (8, 8)}
    return [
        *rows("mlcd MLCDVisionModel step3p7 Step3p7VisionModel"),
        *rows("yolos YolosModel YolosForObjectDetection", image_size=SQUARE, num_detection_tokens=5),
        *rows("llama4 Llama4VisionModel", **LLAMA4),
        *rows("x_clip XCLIPVisionModel", lambda batch, generator: IMAGES(2 * batch, generator), num_frames=2),
        *rows("molmo2 Molmo2VisionModel", draw(pixel_values=(NUM_PATCHES, PATCH_VALUES)),
              num_position_embeddings=NUM_PATCHES, image_size=list(SQUARE)),
        *rows("granite_docling GraniteDoclingVisionModel", scale_factor=2, out_hidden_size=32,
              deepstack_visual_indexes=[1, 2], use_fine_route=False),
        *rows("videomae VideoMAEForPreTraining", both(VIDEOS, hidden), **VIDEO_SIZES),
        *rows("vit_mae ViTMAEForPreTraining", NOISED, mask_ratio=0.25),
        *rows("vjepa2 VJEPA2Model", CLIPS, **JEPA),
        *rows("beit BeitBackbone", use_shared_relative_position_bias=True, **stages),
        *rows("beit BeitForSemanticSegmentation", **every, **small),
        *rows("data2vec Data2VecVisionForSemanticSegmentation", **every, **small),
        *rows("dinov2 Dinov2Backbone dinov2_with_registers Dinov2WithRegistersBackbone pixio PixioBackbone "
              "tipsv2 Tipsv2VisionBackbone", **stages),
        *rows("dinov3_vit DINOv3ViTBackbone", num_register_tokens=4, **stages),
        *rows("sapiens2 Sapiens2Backbone", **SAPIENS, **stages),
        *rows("sapiens2 Sapiens2ForSemanticSegmentation Sapiens2ForPoseEstimation Sapiens2ForNormalEstimation "
              "Sapiens2ForPointmapEstimation Sapiens2ForImageMatting", **SAPIENS,
              head_config={**head, "scale_final_hidden_sizes": [4, 4]}),
        *rows("vitpose VitPoseForPoseEstimation", backbone_config=pose),
        *rows("dpt DPTForDepthEstimation DPTForSemanticSegmentation", backbone_out_indices=(0, 1, 2, 3), **dense),
        *rows("depth_anything DepthAnythingForDepthEstimation "
              "prompt_depth_anything PromptDepthAnythingForDepthEstimation",
              backbone_config=dino, reassemble_hidden_size=32, head_hidden_size=8, **dense),
        *rows("zoedepth ZoeDepthForDepthEstimation", backbone_config={"model_type": "beit", **tokens},
              bottleneck_features=8, num_relative_features=8, bin_embedding_dim=8, **dense),
        *rows("upernet UperNetForSemanticSegmentation", hidden_size=8, auxiliary_in_channels=32, **small,
              backbone_config={"model_type": "dinov2", **every}),
    ]  # fmt: skip


def refused() -> list[Entry]:
    """Classes with windows, stages, grids, factorised attention or packed rows, which the library is to refuse."""
    swin = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "patch_size": 4, "window_size": 3}
    stages = {"depths": (2, 2, 2, 2), "hidden_sizes": (8, 16, 24, 32)}
    pyramid = {**stages, "num_attention_heads": (1, 2, 2, 4)}
    large = draw(pixel_values=(3, 64, 64))
    sam = {"window_size": 3, "global_attn_indexes": (1, 3), "output_channels": 16}
    detr = {"d_model": 32, "num_queries": 5, "encoder_layers": DEPTH, "decoder_layers": 2}
    detr |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    detr |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64)
    detr |= dict.fromkeys(("use_timm_backbone", "use_pretrained_backbone"), False)
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
    names = ("image_model_config", "patch_model_config", "fov_model_config")
    tiles = {name: {"model_type": "dinov2", "image_size": 24} for name in names}
    halves = dict.fromkeys(("pixel_values", "prompt_pixel_values", "prompt_masks"), (3, IMAGE_SIZE // 2, IMAGE_SIZE))
    windows = {"window_size": 32, "fullatt_block_indexes": [1, 3], "out_hidden_size": 32}
    learned = {"num_position_embeddings": NUM_PATCHES, "out_hidden_size": 32}
    sides = dict.fromkeys(("pos_emb_height", "pos_emb_width"), GRID)
    flat = packed("pixel_values", shape=lambda total: (total, PATCH_VALUES))
    strip = packed("pixel_values", "target_sizes", lambda total: (1, 3, PATCH_SIZE, total * PATCH_SIZE))
    return [
        *rows("swin SwinModel SwinForImageClassification swinv2 Swinv2Model donut DonutSwinModel "
              "maskformer MaskFormerSwinBackbone", **swin),
        *rows("swin2sr Swin2SRModel", image_size=24, **swin | {"patch_size": 1, "window_size": 4}),
        *rows("focalnet FocalNetModel", embed_dim=16, depths=(2, 2), hidden_sizes=(16, 32), focal_levels=(2, 2),
              focal_windows=(3, 3), patch_size=4),
        *rows("levit LevitModel", large, image_size=64, patch_size=16, hidden_sizes=(16, 24, 32), depths=(4, 4, 4),
              num_attention_heads=(2, 2, 2), key_dim=(8, 8, 8),
              down_ops=[["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2]]),
        *rows("mobilevit MobileViTModel", large, patch_size=2, hidden_sizes=(16, 24, 32), image_size=64,
              neck_hidden_sizes=(8, 8, 8, 8, 8, 8, 16)),
        *rows("mobilevitv2 MobileViTV2Model", large, patch_size=2, image_size=64, width_multiplier=0.25),
        *rows("poolformer PoolFormerModel", large, **stages),
        *rows("convnext ConvNextModel", large, **stages, patch_size=4),
        *rows("swiftformer SwiftFormerModel", large, depths=(2, 2, 2, 2), embed_dims=(8, 16, 24, 32)),
        *rows("pvt PvtModel", large, **pyramid, image_size=64),
        *rows("pvt_v2 PvtV2Model", large, **pyramid, image_size=(64, 64)),
        *rows("segformer SegformerModel SegformerForImageClassification glpn GLPNModel", large, **pyramid),
        *rows("cvt CvtModel", embed_dim=(8, 16, 32), num_heads=(1, 2, 2), depth=(1, 2, 4)),
        *rows("hiera HieraModel HieraForImageClassification", large, image_size=(64, 64), embed_dim=8, depths=(2, 2, 4),
              num_heads=(1, 2, 4), num_query_pool=2, masked_unit_size=(4, 4), patch_size=(7, 7),
              masked_unit_attention=(True, True, False)),
        *rows("sam SamVisionEncoder SamVisionModel sam_hq SamHQVisionEncoder SamHQVisionModel", num_pos_feats=8, **sam),
        *rows("got_ocr2 GotOcr2VisionEncoder", **sam),
        *rows("deepseek_ocr2 DeepseekOcr2SamVisionEncoder", downsample_channels=[16, 16], **sam),
        *rows("sam3 Sam3ViTModel", window_size=3, global_attn_indexes=[1, 3], pretrain_image_size=24),
        *rows("vitdet VitDetModel VitDetBackbone", pretrain_image_size=IMAGE_SIZE, window_block_indices=(0, 2),
              window_size=3),
        *rows("seggpt SegGptModel", draw(**halves), image_size=SQUARE, pretrain_image_size=IMAGE_SIZE, merge_index=1,
              intermediate_hidden_state_indices=(1, 2, 3)),
        *rows("lw_detr LwDetrViTBackbone", pretrain_image_size=IMAGE_SIZE, num_windows=4, window_block_indices=(0, 2),
              out_indices=[2, 4]),
        *rows("rf_detr RfDetrDinov2Backbone", num_windows=2, window_block_indexes=[0, 2], out_indices=[2, 4]),
        *rows("eomt EomtForUniversalSegmentation eomt_dinov3 EomtDinov3ForUniversalSegmentation",
              num_blocks=2, num_queries=5),
        *rows("videomt VideomtForUniversalSegmentation", draw(pixel_values_videos=(2, 3, *SQUARE)),
              num_blocks=2, num_queries=5),
        *rows("timesformer TimesformerModel TimesformerForVideoClassification", VIDEOS, **VIDEO_SIZES),
        *rows("videoprism VideoPrismVisionModel VideoPrismForVideoClassification", CLIPS,
              **VIDEO_SIZES | {"tubelet_size": (1, 8, 8)}, num_spatial_layers=DEPTH, num_temporal_layers=DEPTH),
        *rows("groupvit GroupViTVisionModel", depths=(4, 2, 2), num_group_tokens=(9, 4, 0),
              num_output_groups=(9, 4, 4)),
        *rows("bridgetower BridgeTowerVisionModel", draw(image=(3, *SQUARE)), hidden_size=64),
        *rows("detr DetrModel conditional_detr ConditionalDetrModel", backbone=None,
              backbone_config={**resnet, "out_features": ["stage4"]}, **detr),
        *rows("depth_pro DepthProModel", draw(pixel_values=(3, 96, 96)), patch_size=24, intermediate_hook_ids=(3, 1),
              intermediate_feature_dims=(8, 8), scaled_images_feature_dims=(8, 8, 8), fusion_hidden_size=8, **tiles),
        *rows("qwen2_vl Qwen2VisionTransformerPretrainedModel", packed(), embed_dim=32),
        *rows("qwen2_5_vl Qwen2_5_VisionTransformerPretrainedModel qwen2_5_omni Qwen2_5OmniVisionEncoder "
              "exaone4_5 Exaone4_5_VisionModel", packed(), **windows),
        *rows("qwen3_vl Qwen3VLVisionModel qwen3_vl_moe Qwen3VLMoeVisionModel "
              "cohere_compass CohereCompassVisionModel", packed(), deepstack_visual_indexes=(1, 2), **learned),
        *rows("qwen3_5 Qwen3_5VisionModel", packed(), **learned),
        *rows("glm4v Glm4vVisionModel", packed(), out_hidden_size=32),
        *rows("ernie4_5_vl_moe Ernie4_5_VLMoeVisionTransformerPretrainedModel",
              packed(shape=lambda total: (total, PATCH_VALUES))),
        *rows("video_llama_3 VideoLlama3VisionModel", both(flat, each(merge_sizes=2))),
        *rows("paddleocr_vl PaddleOCRVisionModel",
              packed("pixel_values", shape=lambda total: (1, total, 3, PATCH_SIZE, PATCH_SIZE))),
        *rows("kimi_k25 Kimi_K25VisionModel",
              packed("pixel_values", shape=lambda total: (total, 3, PATCH_SIZE, PATCH_SIZE)), **sides),
        *rows("dots3_note Dots3NoteVisionModel", flat, mlp_layer_types=["dense"] * DEPTH, adapter_in_dim=32,
              adapter_out_dim=32),
        *rows("muse_spark MuseSparkVisionModel", packed("pixel_values"), layer_types=["full_attention"] * DEPTH,
              **sides),
        *rows("inkling2 Inkling2VisionModel",
              packed("pixel_values", "image_grid_thw", lambda total: (total, 2 * PATCH_SIZE, 2 * PATCH_SIZE, 3)),
              text_hidden_size=32, projection_hidden_dim=32),
        *rows("hunyuan_vl HunYuanVLVisionTransformer", flat, text_hidden_size=32),
        *rows("minimax_m3_vl MiniMaxM3VLVisionModel", packed("pixel_values")),
        *rows("lfm3_vl Lfm3VlVisionModel", packed("pixel_values"), layer_types=["conv", "full_attention"] * 2),
        *rows("mllama MllamaVisionModel", mllama_tiles, **MLLAMA),
        *rows("minicpmv4_6 MiniCPMV4_6VisionModel minicpmv4_7 MiniCPMV4_7VisionModel minicpm_ocr MiniCPMOcrVisionModel",
              strip, insert_layer_id=2),
        *rows("layoutlmv3 LayoutLMv3Model", WORDS, input_size=IMAGE_SIZE, coordinate_size=5, shape_size=6),
    ]  # fmt: skip


def composites() -> list[Entry]:
    """Models of several parts, of which those behind the vision tower pool its tokens or take any number of them."""
    token = {"image_token_index": IMAGE_TOKEN}
    bottleneck = {"qformer_config": {"encoder_hidden_size": 32}, "num_query_tokens": 5, "image_text_hidden_size": 16}
    opt = {"text_config": {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}, **token}
    patches = {"vision_config": {"num_patches": NUM_PATCHES}}
    cross = {"is_decoder": True, "add_cross_attention": True}
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_layer": 2, **cross}
    caption = both(IMAGES, prompt(prefix="decoder_"))
    return [
        *rows("clip CLIPModel siglip SiglipModel aimv2 Aimv2Model chinese_clip ChineseCLIPModel "
              "metaclip_2 MetaClip2Model", WORDS),
        *rows("siglip2 Siglip2Model", both(naflex, prompt()), **patches),
        *rows("altclip AltCLIPModel", WORDS, text_config={"project_dim": 16}),
        *rows("vision_text_dual_encoder VisionTextDualEncoderModel", WORDS,
              vision_config={"model_type": "vit"}, text_config={"model_type": "bert"}),
        *rows("vision_encoder_decoder VisionEncoderDecoderModel", caption, encoder={"model_type": "vit"}, decoder=gpt2),
        *rows("vision_encoder_decoder VisionEncoderDecoderModel", caption,
              encoder={"model_type": "deit"}, decoder={"model_type": "bert", **cross}),
        *rows("blip BlipModel BlipForConditionalGeneration BlipForImageTextRetrieval", WORDS,
              text_config={"encoder_hidden_size": 32}),
        *rows("blip_2 Blip2Model Blip2ForConditionalGeneration", both(IMAGES, prompt(5)), **bottleneck, **opt),
        *rows("blip_2 Blip2VisionModelWithProjection", **bottleneck),
        *rows("instructblip InstructBlipForConditionalGeneration", both(IMAGES, prompt(5), prompt(prefix="qformer_")),
              **bottleneck, **opt),
    ]  # fmt: skip


def language_models() -> list[Entry]:
    """Language models that take any number of image tokens, as many as the words have places for."""
    image = both(IMAGES, prompt(NUM_PATCHES))
    token = {"image_token_index": IMAGE_TOKEN}
    clip = {"vision_config": {"model_type": "clip_vision_model"}}
    full = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    siglip = {"vision_config": {"model_type": "siglip_vision_model"}, **full}
    return [
        *rows("llava LlavaForConditionalGeneration", image, **token, **clip),
        *rows("llava LlavaForConditionalGeneration", image, **token, **siglip),
        *rows("paligemma PaliGemmaForConditionalGeneration", image, projection_dim=32, **token),
    ]  # fmt: skip


def refused_composites() -> list[Entry]:
    """Models of several parts, of which those behind the vision tower may need every token."""
    image, nine = both(IMAGES, prompt(NUM_PATCHES)), both(IMAGES, prompt(9))
    token, token_id = {"image_token_index": IMAGE_TOKEN}, {"image_token_id": IMAGE_TOKEN}
    full = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    pixtral = {"vision_config": {"model_type": "pixtral"}, **full}
    patches = {"vision_config": {"num_patches": NUM_PATCHES}}
    images = padded("pixel_attention_mask", PATCH_SIZE, images=2)
    wide = [IMAGE_SIZE, 2 * IMAGE_SIZE]
    halves = both(draw(pixel_values=(3, 3, *SQUARE)), each(image_sizes=wide))
    # The whole image, its two halves, and a new line after each row of them.
    tiled = both(halves, prompt(NUM_PATCHES + GRID * (2 * GRID + 1)))
    mit = {"mit_hidden_size": 32, "mit_num_attention_heads": 2, "mit_intermediate_size": 64, "num_frames": 2}
    resampler = {"resampler_n_latents": 5, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16}
    vq = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "num_embeddings": 16}
    perception = {"model_type": "timm_wrapper", "architecture": "vit_pe_core_tiny_patch16_384", "do_pooling": True}
    return [
        *rows("clipseg CLIPSegModel flava FlavaModel groupvit GroupViTModel", WORDS),
        *rows("clipseg CLIPSegForImageSegmentation", WORDS, extract_layers=(0, 1, 2), reduce_dim=16),
        *rows("x_clip XCLIPModel", both(draw(pixel_values=(2, 3, *SQUARE)), prompt()), vision_config=mit,
              prompt_num_attention_heads=2, projection_dim=32),
        *rows("owlvit OwlViTModel OwlViTForObjectDetection owlv2 Owlv2Model Owlv2ForObjectDetection", WORDS,
              projection_dim=32),
        *rows("git GitForCausalLM", WORDS, num_hidden_layers=2),
        *rows("kosmos2 Kosmos2ForConditionalGeneration", both(IMAGES, prompt(9, places="image_embeds_position_mask")),
              latent_query_num=9, text_config={"layers": 2, "ffn_dim": 64}),
        *rows("llava LlavaForConditionalGeneration", both(padded(sizes="image_sizes"), prompt(areas())),
              **token, **pixtral),
        *rows("mistral3 Mistral3ForConditionalGeneration", both(padded(sizes="image_sizes"), prompt(areas(4))),
              **token),
        *rows("llava_next LlavaNextForConditionalGeneration llava_onevision LlavaOnevisionForConditionalGeneration",
              tiled, image_grid_pinpoints=[wide, wide[::-1]], **token),
        *rows("vipllava VipLlavaForConditionalGeneration", image, vision_feature_layer=(-2, -3, 1), **token),
        *rows("video_llava VideoLlavaForConditionalGeneration", image, **token),
        *rows("gemma3 Gemma3ForConditionalGeneration", nine, mm_tokens_per_image=9, **token),
        *rows("aya_vision AyaVisionForConditionalGeneration", nine, **token),
        *rows("internvl InternVLForConditionalGeneration cohere2_vision Cohere2VisionForConditionalGeneration",
              nine, **token_id),
        *rows("idefics2 Idefics2ForConditionalGeneration", both(images, prompt(2 * 5)), perceiver_config=resampler,
              **token_id),
        *rows("idefics3 Idefics3ForConditionalGeneration smolvlm SmolVLMForConditionalGeneration",
              both(images, prompt(2 * 9)), **token_id),
        *rows("janus JanusForConditionalGeneration", image, vision_config={"projection_dim": 32}, vq_config=vq,
              **token_id),
        *rows("ovis2 Ovis2ForConditionalGeneration deepseek_vl DeepseekVLForConditionalGeneration", image, **token_id),
        *rows("lfm2_vl Lfm2VlForConditionalGeneration", both(naflex, prompt(areas(4))), projector_hidden_size=32,
              **patches, **token_id),
        *rows("mllama MllamaForConditionalGeneration", both(mllama_tiles, prompt()), vision_config=MLLAMA,
              text_config={"cross_attention_layers": [1]}),
        *rows("llama4 Llama4ForConditionalGeneration", nine, vision_config={**LLAMA4, "vision_output_dim": 32},
              text_config={"num_local_experts": 2, "intermediate_size_mlp": 64}, **token),
        *rows("perception_lm PerceptionLMForConditionalGeneration",
              both(draw(pixel_values=(1, 3, *SQUARE)), prompt(NUM_PATCHES)), **token_id,
              vision_config={**perception, "model_args": {**TIMM, "global_pool": ""}}),
    ]  # fmt: skip
