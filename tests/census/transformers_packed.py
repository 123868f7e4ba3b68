"""Towers of transformers that are given all images of a batch as one sequence of patches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.census.entry import Entry
from tests.census.transformers import rows
from tests.census.transformers_inputs import (
    DEPTH,
    GRID,
    IMAGE_TOKEN,
    NUM_PATCHES,
    PATCH_SIZE,
    PATCH_VALUES,
    Inputs,
    areas,
    both,
    each,
    packed,
    padded,
    prompt,
)

WINDOWS = {"window_size": 32, "fullatt_block_indexes": [1, 3], "out_hidden_size": 32}
LEARNED = {"num_position_embeddings": NUM_PATCHES, "out_hidden_size": 32}
SIDES = dict.fromkeys(("pos_emb_height", "pos_emb_width"), GRID)
FLAT = packed("pixel_values", shape=lambda total: (total, PATCH_VALUES))
IMAGES = packed("pixel_values", shape=lambda total: (total, 3, PATCH_SIZE, PATCH_SIZE))
STRIP = packed("pixel_values", "target_sizes", lambda total: (1, 3, PATCH_SIZE, total * PATCH_SIZE))
CELLS = packed("pixel_values", "image_grid_thw", lambda total: (total, 2 * PATCH_SIZE, 2 * PATCH_SIZE, 3))
ROW = packed("pixel_values", shape=lambda total: (1, total, 3, PATCH_SIZE, PATCH_SIZE))
IDS = {
    name: IMAGE_TOKEN + number
    for number, name in enumerate(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"))
}
DEEP, OUT = {"deepstack_visual_indexes": (1, 2), **LEARNED}, {"out_hidden_size": 32}
ROTARY = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
MIXED = {"layer_types": ["linear_attention", "full_attention"]}


def packed_flat(name: str, sizes: str) -> Inputs:
    """Patches without a dimension for time."""
    return packed(name, sizes, lambda total: (total, PATCH_VALUES))


def typed(words: Inputs) -> Inputs:
    """Words, places of images among them, and which of them are which."""

    def make(batch: int, generator: torch.Generator) -> dict[str, Any]:
        made = words(batch, generator)
        return {**made, "mm_token_type_ids": (made["input_ids"] == IMAGE_TOKEN).long()}

    return make


MERGED = both(padded(sizes="image_sizes"), prompt(areas(4)))
kinds = typed(prompt(areas(4)))


def towers() -> list[Entry]:
    """All of them that are supported."""
    return [
        *rows("qwen2_vl Qwen2VisionTransformerPretrainedModel", packed(), embed_dim=32),
        *rows("qwen2_5_vl Qwen2_5_VisionTransformerPretrainedModel qwen2_5_omni Qwen2_5OmniVisionEncoder "
              "exaone4_5 Exaone4_5_VisionModel", packed(), **WINDOWS),
        *rows("qwen3_vl Qwen3VLVisionModel qwen3_vl_moe Qwen3VLMoeVisionModel "
              "qwen3_omni_moe Qwen3OmniMoeVisionEncoder cohere_compass CohereCompassVisionModel",
              packed(), deepstack_visual_indexes=(1, 2), **LEARNED),
        *rows("qwen3_5 Qwen3_5VisionModel qwen3_5_moe Qwen3_5MoeVisionModel qwen4_exp Qwen4ExpVisionModel",
              packed(), **LEARNED),
        *rows("glm4v Glm4vVisionModel glm4v_moe Glm4vMoeVisionModel glm_ocr GlmOcrVisionModel "
              "glm5_next Glm5NextVisionModel", packed(), out_hidden_size=32),
        *rows("glm_image GlmImageVisionModel", FLAT),
        *rows("ernie4_5_vl_moe Ernie4_5_VLMoeVisionTransformerPretrainedModel",
              packed(shape=lambda total: (total, PATCH_VALUES))),
        *rows("video_llama_3 VideoLlama3VisionModel", both(FLAT, each(merge_sizes=2))),
        *rows("paddleocr_vl PaddleOCRVisionModel PaddleOCRVisionTransformer", ROW),
        *rows("kimi_k25 Kimi_K25VisionModel", IMAGES, **SIDES),
        *rows("dots3_note Dots3NoteVisionModel", FLAT, mlp_layer_types=["dense"] * DEPTH, adapter_in_dim=32,
              adapter_out_dim=32),
        *rows("muse_spark MuseSparkVisionModel muse_glimmer MuseGlimmerVisionModel", packed("pixel_values"),
              layer_types=["window_attention", "full_attention"] * 2, pos_emb_height=4, pos_emb_width=4),
        *rows("hunyuan_vl HunYuanVLVisionTransformer", FLAT, text_hidden_size=32),
        *rows("minimax_m3_vl MiniMaxM3VLVisionModel", packed("pixel_values")),
        *rows("cosmos3_edge Cosmos3EdgeVisionModel", FLAT, num_patches=NUM_PATCHES),
        *rows("pixtral PixtralVisionModel", padded(sizes="image_sizes")),
        *rows("inkling2 Inkling2VisionModel", CELLS, text_hidden_size=32, projection_hidden_dim=32),
        *rows("lfm3_vl Lfm3VlVisionModel", packed("pixel_values"), num_hidden_layers=2 * DEPTH,
              layer_types=["conv", "full_attention"] * DEPTH),
        *rows("minicpmv4_6 MiniCPMV4_6VisionModel minicpmv4_7 MiniCPMV4_7VisionModel minicpm_ocr MiniCPMOcrVisionModel",
              STRIP, insert_layer_id=3, num_hidden_layers=6),
    ]  # fmt: skip


def behind_merger() -> list[Entry]:
    """The towers that merge tokens between blocks, with stages behind it."""
    return [replace(entry, stages=(4, 5)) for entry in towers() if entry.family.startswith("minicpm")]


def composites() -> list[Entry]:
    """Whole models behind such towers, which get as many tokens as if nothing had been pruned."""
    both_kinds = both(packed("pixel_values", "image_grid_thw"), kinds)
    token, text = {"image_token_index": IMAGE_TOKEN}, {"text_config": ROTARY}
    return [
        *rows("qwen2_vl Qwen2VLModel Qwen2VLForConditionalGeneration", both_kinds, vision_config={"embed_dim": 32},
              **text, **IDS),
        *rows("qwen2_5_vl Qwen2_5_VLModel Qwen2_5_VLForConditionalGeneration", both_kinds, vision_config=WINDOWS,
              **text, **IDS),
        *rows("qwen3_vl Qwen3VLModel Qwen3VLForConditionalGeneration", both_kinds, **text, **IDS, vision_config=DEEP),
        *rows("glm4v Glm4vModel Glm4vForConditionalGeneration", both_kinds, **text, **IDS, vision_config=OUT),
        *rows("llava LlavaModel LlavaForConditionalGeneration", both(padded(sizes="image_sizes"), prompt(areas())),
              **token, vision_config={"model_type": "pixtral"}, vision_feature_select_strategy="full",
              vision_feature_layer=-1),
        *rows("mistral3 Mistral3Model Mistral3ForConditionalGeneration", MERGED, **token),
    ]  # fmt: skip


def alike() -> list[Entry]:
    """More of them, which differ in what stands behind the tower."""
    both_kinds, flat = (both(make("pixel_values", "image_grid_thw"), kinds) for make in (packed, packed_flat))
    images = both(packed("pixel_values", "image_grid_thw", lambda total: (total, 3, PATCH_SIZE, PATCH_SIZE)), kinds)
    strips = packed("pixel_values", "target_sizes", lambda total: (1, 3, PATCH_SIZE, total * PATCH_SIZE), multiple=4)
    merger = {"insert_layer_id": 3, "vision_config": {"num_hidden_layers": 6}}
    token, text, mixed = {"image_token_index": IMAGE_TOKEN}, {"text_config": ROTARY}, {"text_config": ROTARY | MIXED}
    glm = {
        "text_config": {
            "rope_parameters": {**ROTARY["rope_parameters"], "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
        }
    }
    convolutions = {"num_hidden_layers": 2 * DEPTH, "layer_types": ["conv", "full_attention"] * DEPTH}
    return [
        *rows("lighton_ocr LightOnOcrModel LightOnOcrForConditionalGeneration", MERGED, **IDS),
        *rows("mistral_large4 MistralLarge4Model MistralLarge4ForConditionalGeneration", MERGED, **token),
        *rows("qwen3_vl_moe Qwen3VLMoeModel Qwen3VLMoeForConditionalGeneration", both_kinds, **text, **IDS,
              vision_config=DEEP),
        *rows("qwen3_5 Qwen3_5Model Qwen3_5ForConditionalGeneration "
              "qwen3_5_moe Qwen3_5MoeModel Qwen3_5MoeForConditionalGeneration", both_kinds, **IDS, **mixed,
              vision_config=LEARNED),
        *rows("qwen2_5_omni Qwen2_5OmniThinkerForConditionalGeneration", both_kinds, vision_config=WINDOWS, **text,
              **IDS),
        *rows("qwen3_omni_moe Qwen3OmniMoeThinkerForConditionalGeneration", both_kinds, vision_config=DEEP, **text,
              **IDS),
        *rows("glm46v Glm46VModel Glm46VForConditionalGeneration glm_ocr GlmOcrModel GlmOcrForConditionalGeneration",
              both_kinds, **glm, **IDS, vision_config=OUT),
        *rows("glm4v_moe Glm4vMoeModel Glm4vMoeForConditionalGeneration", both_kinds, **IDS, vision_config=OUT,
              text_config=glm["text_config"] | {"n_routed_experts": 4, "num_experts_per_tok": 2}),
        *rows("glm5_next Glm5NextForConditionalGeneration", both_kinds, **mixed, **IDS,
              vision_config=OUT),
        *rows("ernie4_5_vl_moe Ernie4_5_VLMoeModel Ernie4_5_VLMoeForConditionalGeneration", flat, **IDS,
              text_config={"rope_parameters": ROTARY["rope_parameters"] | {"mrope_section": [3, 3, 2]}}),
        *rows("hyperclovax_vision_v2 HyperCLOVAXVisionV2Model HyperCLOVAXVisionV2ForConditionalGeneration", both_kinds,
              vision_config=WINDOWS, **IDS),
        *rows("kimi_k25 Kimi_K25Model Kimi_K25ForConditionalGeneration", images, vision_config=SIDES,
              vision_hidden_size=32, projection_hidden_size=32, **IDS),
        *rows("minimax_m3_vl MiniMaxM3VLModel MiniMaxM3SparseForConditionalGeneration", both_kinds, **IDS, **token),
        *rows("paddleocr_vl PaddleOCRVLModel PaddleOCRVLForConditionalGeneration", images, **text, **IDS),
        *rows("video_llama_3 VideoLlama3Model VideoLlama3ForConditionalGeneration",
              both(flat, each(image_merge_sizes=2)), **IDS),
        *rows("inkling2 Inkling2Model Inkling2ForConditionalGeneration", both(CELLS, prompt(areas())),
              vision_config={"text_hidden_size": 32, "projection_hidden_dim": 32}, **IDS),
        *rows("lfm3_vl Lfm3VlModel Lfm3VlForConditionalGeneration", both_kinds, vision_config=convolutions, **IDS,
              text_config={"layer_types": ["conv", "full_attention"]}),
        *rows("minicpmv4_6 MiniCPMV4_6Model MiniCPMV4_6ForConditionalGeneration "
              "minicpmv4_7 MiniCPMV4_7Model MiniCPMV4_7ForConditionalGeneration",
              both(strips, typed(prompt(areas(16, 4)))), **mixed, **merger, **IDS),
        *rows("minicpm_ocr MiniCPMOcrModel MiniCPMOcrForConditionalGeneration", both(strips, prompt(areas(4, 4))),
              **mixed, **merger, **IDS),
    ]  # fmt: skip
