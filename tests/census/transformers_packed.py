"""Towers of transformers that are given all images of a batch as one sequence of patches."""

from __future__ import annotations

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
IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


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


def composites() -> list[Entry]:
    """Whole models behind such towers, which get as many tokens as if nothing had been pruned."""
    ids = dict(zip(IDS, range(IMAGE_TOKEN, IMAGE_TOKEN + len(IDS)), strict=True))
    rotary = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    both_kinds = both(packed("pixel_values", "image_grid_thw"), kinds)
    return [
        *rows("qwen2_vl Qwen2VLModel Qwen2VLForConditionalGeneration", both_kinds, vision_config={"embed_dim": 32},
              text_config=rotary, **ids),
        *rows("qwen2_5_vl Qwen2_5_VLModel Qwen2_5_VLForConditionalGeneration", both_kinds, vision_config=WINDOWS,
              text_config=rotary, **ids),
        *rows("qwen3_vl Qwen3VLModel Qwen3VLForConditionalGeneration", both_kinds, text_config=rotary, **ids,
              vision_config={"deepstack_visual_indexes": (1, 2), **LEARNED}),
        *rows("glm4v Glm4vModel Glm4vForConditionalGeneration", both_kinds, text_config=rotary, **ids,
              vision_config={"out_hidden_size": 32}),
    ]  # fmt: skip


def kinds(batch: int, generator: torch.Generator) -> dict[str, Any]:
    """Words, places of images among them, one for every four patches, and which of them are which."""
    made = prompt(areas(4))(batch, generator)
    return {**made, "mm_token_type_ids": (made["input_ids"] == IMAGE_TOKEN).long()}
