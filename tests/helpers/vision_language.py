"""Vision-language models of transformers at a small size, and a batch for them: words alone, two images, one image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.census.transformers import build, modules_of
from tests.census.transformers_inputs import GRID, IMAGE_SIZE, IMAGE_TOKEN, NUM_PATCHES, PATCH_SIZE, PATCH_VALUES

START, END = 41, 42  # stand around an image
NUM_IMAGES = 3
GRIDS = ((6, 4), (4, 8), (4, 4))
"""Rows and columns of patches of the images, for models that take different sizes."""
WIDE = [IMAGE_SIZE, 2 * IMAGE_SIZE]


class Case(NamedTuple):
    """A vision-language model.

    Attributes:
        family: Its folder.
        name: Its class.
        given: What its config is given.
        inputs: Images and prompts for it.
        block: The side of the square of patches that an image token is made of, where it is made of one.
        swaps: Whether the library itself swaps the images of a prompt in a search of several beams.
    """

    family: str
    name: str
    given: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    block: int | None = None
    swaps: bool = False

    @property
    def label(self) -> str:
        """Its family, and its tower where that is not the family's usual one."""
        return f"{self.family}_pixtral" if self.inputs is of_sizes else self.family

    def model(self) -> nn.Module:
        """The model, in eval mode, the same every time."""
        torch.manual_seed(0)
        model = build(self.family, self.name, self.given).eval()
        for name, weight in model.named_parameters():
            if name.endswith(("mm_input_projection_weight", "image_newline")):  # zeros, or huge, as they are made
                nn.init.normal_(weight, std=0.2)
        return model


def prompts(counts: Sequence[int]) -> dict[str, Tensor]:
    """Token ids and mask of words alone, of words with two images, and with one, padded at the left."""
    image = [[START, *[IMAGE_TOKEN] * count, END] for count in counts]
    rows = [[5, 6, 7, 8], [5, *image[0], 6, *image[1], 7, 8], [*image[2], 9, 10, 11]]
    length = max(map(len, rows))
    padding = [length - len(row) for row in rows]
    return {
        "input_ids": torch.tensor([[0] * pad + row for pad, row in zip(padding, rows, strict=True)]),
        "attention_mask": torch.tensor([[0] * pad + [1] * (length - pad) for pad in padding]),
    }


def pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def square(count: int, types: Callable[[Tensor], Tensor] | None = None) -> Callable[[], dict[str, Any]]:
    """Images of one size, each with as many tokens, and types of tokens made of the ids."""

    def make() -> dict[str, Any]:
        words = prompts([count] * NUM_IMAGES)
        typed = {} if types is None else {"token_type_ids": types(words["input_ids"])}
        return {**words, **typed, "pixel_values": pixels(NUM_IMAGES, 3, IMAGE_SIZE, IMAGE_SIZE)}

    return make


def by_prompt() -> dict[str, Any]:
    """The same with a dimension for the images of a prompt, those that are missing being zero."""
    given = square(9)()
    images = torch.zeros(NUM_IMAGES, 2, 3, IMAGE_SIZE, IMAGE_SIZE)
    images[1], images[2, 0] = given["pixel_values"][:2], given["pixel_values"][2]
    return {**given, "pixel_values": images}


def tiled() -> dict[str, Any]:
    """Images of different sizes in tiles, with a token for each new line (LLaVA-NeXT)."""
    sizes = [WIDE, WIDE[::-1], [IMAGE_SIZE, WIDE[1] - 10]]
    # The whole image; two tiles with a new line behind each row; of the last the columns that were no padding.
    counts = [NUM_PATCHES + GRID * (2 * GRID + 1), NUM_PATCHES + 2 * GRID * (GRID + 1), NUM_PATCHES + GRID * 11]
    return {
        **prompts(counts),
        "pixel_values": pixels(NUM_IMAGES, 3, 3, IMAGE_SIZE, IMAGE_SIZE),
        "image_sizes": torch.tensor(sizes),
    }


def packed() -> dict[str, Any]:
    """Patches of images of different sizes, in one sequence."""
    grids = torch.tensor([(1, *grid) for grid in GRIDS])
    words = prompts((grids.prod(1) // 4).tolist())
    return {
        **words,
        "pixel_values": pixels(int(grids.prod(1).sum()), 2 * PATCH_VALUES),
        "image_grid_thw": grids,
        "mm_token_type_ids": (words["input_ids"] == IMAGE_TOKEN).int(),
    }


def of_sizes() -> dict[str, Any]:
    """Images of different sizes, padded to the largest."""
    return {
        **prompts([rows * columns for rows, columns in GRIDS]),
        "pixel_values": pixels(NUM_IMAGES, 3, IMAGE_SIZE, 8 * PATCH_SIZE),
        "image_sizes": torch.tensor(GRIDS) * PATCH_SIZE,
    }


_INDEX, _ID = {"image_token_index": IMAGE_TOKEN}, {"image_token_id": IMAGE_TOKEN}
_CLIP, _SIGLIP = ({"vision_config": {"model_type": name}} for name in ("clip_vision_model", "siglip_vision_model"))
_PIXTRAL = {
    "vision_config": {"model_type": "pixtral", "image_size": 8 * PATCH_SIZE},
    "vision_feature_select_strategy": "full",
    "vision_feature_layer": -1,
}
_TILES = {"image_grid_pinpoints": [WIDE, WIDE[::-1]]}
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_QWEN = {**_ID, "vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": 43}
_PACKED: dict[str, Any] = {"num_heads": 2, "out_hidden_size": 32, "patch_size": PATCH_SIZE}
_GLM = {**_ID, "image_start_token_id": START, "image_end_token_id": END, "video_token_id": 43}
_HALF = {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}}
_GEMMA = {**_INDEX, **_SIGLIP, "mm_tokens_per_image": 9}
_SLIDING = {"text_config": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}}


def _case(family: str, name: str, inputs: Callable[[], dict[str, Any]], *given: dict[str, Any], **others: Any) -> Case:
    return Case(family, name, {key: value for part in given for key, value in part.items()}, inputs, **others)


def is_image(ids: Tensor) -> Tensor:
    return (ids == IMAGE_TOKEN).long()


ALL_CASES = [
    _case("llava", "LlavaForConditionalGeneration", square(NUM_PATCHES), _INDEX, _CLIP, block=1),
    _case("llava", "LlavaForConditionalGeneration", of_sizes, _INDEX, _PIXTRAL, block=1),
    _case("paligemma", "PaliGemmaForConditionalGeneration", square(NUM_PATCHES, torch.zeros_like), _INDEX,
          {"projection_dim": 32}, block=1),
    _case("gemma3", "Gemma3ForConditionalGeneration", square(9, is_image), _GEMMA, _SLIDING, block=2),
    _case("internvl", "InternVLForConditionalGeneration", square(9), _ID, block=2),
    _case("idefics3", "Idefics3ForConditionalGeneration", by_prompt, _ID, block=2),
    _case("smolvlm", "SmolVLMForConditionalGeneration", by_prompt, _ID, block=2),
    _case("llava_next", "LlavaNextForConditionalGeneration", tiled, _INDEX, _CLIP, _TILES),
    _case("llava_onevision", "LlavaOnevisionForConditionalGeneration", tiled, _INDEX, _SIGLIP, _TILES),
    _case("qwen2_vl", "Qwen2VLForConditionalGeneration", packed, _QWEN,
          {"vision_config": {**_PACKED, "embed_dim": 32, "hidden_size": 32}, "text_config": {"rope_parameters": _ROPE}},
          block=2),
    _case("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", packed, _QWEN,
          {"vision_config": {**_PACKED, "window_size": 32, "fullatt_block_indexes": [1, 3]},
           "text_config": {"rope_parameters": _ROPE}}, block=2),
    _case("qwen3_vl", "Qwen3VLForConditionalGeneration", packed, _QWEN,
          {"vision_config": {**_PACKED, "deepstack_visual_indexes": [1, 2], "num_position_embeddings": 64},
           "text_config": {"rope_parameters": {**_ROPE, "mrope_interleaved": True}}}, block=2),
    _case("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", packed, _QWEN,
          {"vision_config": {**_PACKED, "deepstack_visual_indexes": [1, 2], "num_position_embeddings": 64},
           "text_config": {"rope_parameters": {**_ROPE, "mrope_interleaved": True}, "num_experts": 4,
                           "num_experts_per_tok": 2, "moe_intermediate_size": 16}}, block=2),
    *(_case(family, name, packed, _GLM, {"vision_config": _PACKED, "text_config": {**_HALF, **text}}, block=2,
            swaps=True)
      for family, name, text in (
          ("glm4v", "Glm4vForConditionalGeneration", {}),
          ("glm46v", "Glm46VForConditionalGeneration", {}),
          ("glm_ocr", "GlmOcrForConditionalGeneration", {}),
          ("glm4v_moe", "Glm4vMoeForConditionalGeneration",
           {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
      )),
]  # fmt: skip
CASES = [case for case in ALL_CASES if case.name in modules_of(case.family)]


def alone(inputs: dict[str, Any], case: Case, row: int) -> dict[str, Any]:
    """The inputs of one prompt of the batch without padding."""
    first, last = ((0, 0), (0, 2), (2, 3))[row]
    length = int(inputs["attention_mask"][row].sum())
    one: dict[str, Any] = {}
    for name, value in inputs.items():
        if name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
            one[name] = value[row : row + 1, -length:]
        elif first == last:
            continue
        elif "image_grid_thw" in inputs and name == "pixel_values":
            sizes = inputs["image_grid_thw"].prod(1).tolist()
            one[name] = torch.cat(value.split(sizes)[first:last])
        elif case.family in ("idefics3", "smolvlm"):
            one[name] = value[row : row + 1, : last - first]
        else:
            one[name] = value[first:last]
    return one
