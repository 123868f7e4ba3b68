"""Model classes of transformers that the library is to refuse."""

from __future__ import annotations

from tests.census.entry import Entry
from tests.census.transformers import LLAMA4, MLLAMA, TIMM, rows
from tests.census.transformers_inputs import (
    CLIPS,
    DEPTH,
    GRID,
    IMAGE_SIZE,
    IMAGE_TOKEN,
    IMAGES,
    NUM_PATCHES,
    PATCH_SIZE,
    SQUARE,
    VIDEO_SIZES,
    VIDEOS,
    WORDS,
    areas,
    both,
    draw,
    each,
    mllama_tiles,
    naflex,
    padded,
    prompt,
)


def refused() -> list[Entry]:
    """Classes with windows, stages, grids or factorised attention, which the library is to refuse."""
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
        *rows("mllama MllamaVisionModel", mllama_tiles, **MLLAMA),
        *rows("layoutlmv3 LayoutLMv3Model", WORDS, input_size=IMAGE_SIZE, coordinate_size=5, shape_size=6),
    ]  # fmt: skip


def refused_composites() -> list[Entry]:
    """Models of several parts, of which those behind the vision tower may need every token."""
    image, nine = both(IMAGES, prompt(NUM_PATCHES)), both(IMAGES, prompt(9))
    token, token_id = {"image_token_index": IMAGE_TOKEN}, {"image_token_id": IMAGE_TOKEN}
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
        *rows("llava_next LlavaNextForConditionalGeneration llava_onevision LlavaOnevisionForConditionalGeneration",
              tiled, image_grid_pinpoints=[wide, wide[::-1]], **token),
        *rows("vipllava VipLlavaForConditionalGeneration", image, vision_feature_layer=(-2, -3, 1), **token),
        *rows("video_llava VideoLlavaForConditionalGeneration", image, **token),
        *rows("aya_vision AyaVisionForConditionalGeneration", nine, **token),
        *rows("cohere2_vision Cohere2VisionForConditionalGeneration", nine, **token_id),
        *rows("idefics2 Idefics2ForConditionalGeneration", both(images, prompt(2 * 5)), perceiver_config=resampler,
              **token_id),
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
