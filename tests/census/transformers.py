"""Vision model classes of transformers, built from configs at a small size, with all that their forward asks for.

A class that the installed version does not have is left out of the lists.

Legend: B images, T tokens of a packed batch.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.census.entry import Entry
from tests.census.transformers_inputs import (
    CLIPS,
    DEPTH,
    IMAGE_SIZE,
    IMAGE_TOKEN,
    IMAGES,
    NOISED,
    NUM_PATCHES,
    PATCH_SIZE,
    PATCH_VALUES,
    SQUARE,
    VIDEO_SIZES,
    VIDEOS,
    WORDS,
    Inputs,
    both,
    draw,
    hidden,
    naflex,
    padded,
    placed,
    prompt,
)

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
JEPA: dict[str, Any] = {"frames_per_clip": 8, "crop_size": 24, "num_pooler_layers": 1, "pred_hidden_size": 32}
JEPA |= dict.fromkeys(("pred_num_attention_heads", "pred_num_hidden_layers"), 2)
TIMM = {"img_size": SQUARE, "patch_size": PATCH_SIZE, "embed_dim": 32, "depth": DEPTH, "num_heads": 2}
SAPIENS: dict[str, Any] = dict.fromkeys(("num_first_full_attention_layers", "num_last_full_attention_layers"), 1)
SAPIENS["num_key_value_attention_heads"] = 1
LLAMA4: dict[str, Any] = {"intermediate_size": 128, "projector_input_dim": 32, "projector_output_dim": 32}
MLLAMA: dict[str, Any] = {"max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
MLLAMA |= {"num_global_layers": 2, "intermediate_layers_indices": [1, 2], "vision_output_dim": 96}


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


def examples() -> list[Entry]:
    """All that are supported, to prove: flat models, and hierarchies with a fast path."""
    # Which build their entries with what is here.
    from tests.census import transformers_hierarchies, transformers_packed

    return [*flat_examples(), *transformers_packed.alike(), *transformers_hierarchies.examples()]


def flat_examples() -> list[Entry]:
    """Flat models; the plainer ones are compiled and exported as well."""
    from tests.census import transformers_packed  # which builds its entries with what is here

    plain = [replace(entry, compiled=True) for entry in supported()]
    towers = [*transformers_packed.towers(), *transformers_packed.behind_merger()]
    packed = [*towers, *transformers_packed.composites()]
    return [*plain, *uncovered(), *composites(), *language_models(), *packed]


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
    """Vision-language models whose language model is given as many image tokens as are left.

    Before transformers 5 the tower alone is pruned, and prompts would have to count what is left.
    """
    if int(transformers.__version__.partition(".")[0]) < 5:
        return []
    image, nine = both(IMAGES, prompt(NUM_PATCHES)), both(IMAGES, prompt(9))
    token, token_id = {"image_token_index": IMAGE_TOKEN}, {"image_token_id": IMAGE_TOKEN}
    clip = {"vision_config": {"model_type": "clip_vision_model"}}
    full = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    siglip = {"vision_config": {"model_type": "siglip_vision_model"}, **full}
    images = both(padded("pixel_attention_mask", PATCH_SIZE, images=2), prompt(2 * 9))
    return [
        *rows("llava LlavaModel LlavaForConditionalGeneration", image, **token, **clip),
        *rows("llava LlavaForConditionalGeneration", image, **token, **siglip),
        *rows("paligemma PaliGemmaForConditionalGeneration", image, projection_dim=32, **token),
        *rows("internvl InternVLForConditionalGeneration", nine, **token_id),
        *rows("idefics3 Idefics3ForConditionalGeneration smolvlm SmolVLMForConditionalGeneration", images, **token_id),
    ]  # fmt: skip
