"""How much faster does a vision-language model read a prompt with an image? ``python -m benchmarks.prefill``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

import torch
import typer
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tokenprune
from benchmarks.measuring import Device, DType, Name, Pairs, Ratio, environment, measure_rounds, report
from tokenprune.backbones.adapters import example_prompts_of, vision_language_of

WAYS: dict[str, dict[str, Any]] = {
    "random, behind the tower": {"stages": (), "pruner": "random"},
    "diverse, behind the tower": {"stages": (), "pruner": "diverse"},
    "tower, with stages in it": {"stages": (3, 6, 9), "scorer": "redundancy"},
}


def small_llava(width: int, depth: int) -> nn.Module:
    """A LLaVA with CLIP ViT-B/16 at 336 pixels, 441 image tokens, and random weights."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(patch_size=16, image_size=336)
    words = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=depth, num_attention_heads=width // 64
    )
    model: nn.Module = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=words, image_token_index=31999)
    ).eval()
    return model


def main(
    width: Annotated[int, typer.Option(min=64, help="Width of the language model, a multiple of 64.")] = 512,
    depth: Annotated[int, typer.Option(min=1, help="Blocks of the language model.")] = 8,
    keep_ratio: Annotated[
        float, typer.Option(help="The fraction of image tokens that the language model is given.")
    ] = 0.5,
    device: Device = "cpu",
    dtype: DType = "float32",
    pairs: Pairs = 9,
    name: Name = "prefill-cpu",
) -> None:
    """Time the first pass over a prompt of 32 words with an image, dense and pruned in each way, in turn."""
    models = {way: small_llava(width, depth).to(device, getattr(torch, dtype)) for way in WAYS}
    described = vision_language_of(models["random, behind the tower"])
    assert described is not None
    inputs = example_prompts_of(models["random, behind the tower"], described, num_prompts=1, num_words=32)
    counts = {}
    for way, given in WAYS.items():
        kept = keep_ratio if not given["stages"] else tuple(1 - (1 - keep_ratio) * part / 3 for part in (1, 2, 3))
        tokenprune.sparsify(models[way], keep_ratio=kept, **given)
        counts[way] = tokenprune.prefill_flops(models[way], inputs)

    def run(way: str, context: Callable[[], AbstractContextManager[Any]]) -> Callable[[], Any]:
        def forward() -> None:
            with torch.inference_mode(), context():
                models[way](**inputs, logits_to_keep=1, use_cache=True)

        return forward

    first = next(iter(WAYS))
    runs = [run(first, lambda: tokenprune.dense(models[first])), *(run(way, nullcontext) for way in WAYS)]
    dense, *pruned = measure_rounds(runs, rounds=pairs, device=device)
    ratios = {
        way: Ratio(first_seconds=dense, second_seconds=seconds) for way, seconds in zip(WAYS, pruned, strict=True)
    }
    parts = ("tower", "projector", "language model")
    rows = []
    for way, ratio in ratios.items():
        counted = counts[way]
        rows.append(
            [
                way,
                f"{counted.image_tokens[0]} → {counted.image_tokens[1]}",
                "; ".join(f"{counted.dense[part] / 1e9:.1f} → {counted.sparse[part] / 1e9:.1f}" for part in parts),
                f"{counted.cache_bytes[0] / 2**20:.1f} → {counted.cache_bytes[1] / 2**20:.1f}",
                f"{counted.ratio:.2f}",
                f"{ratio.medians[0]:.2f} → {ratio.medians[1]:.2f}",
                f"**{ratio.median:.2f}** ({ratio.quartiles[0]:.2f} … {ratio.quartiles[1]:.2f})",
            ]
        )
    report(
        name,
        f"A LLaVA of random weights (CLIP ViT-B/16 at 336 pixels; {depth} blocks of width {width}), one prompt of 32 "
        f"words with an image, keep ratio {keep_ratio}, medians of {pairs} rounds",
        environment(device, dtype),
        (
            "which tokens go on", "image tokens", "GMACs of tower; projector; language model", "cache, MiB",
            "GMAC ratio", "seconds", "speed-up (quartiles)",
        ),
        rows,
        [{"way": way, "flops": counts[way], "ratio": ratio} for way, ratio in ratios.items()],
        notes=("The tower's stages keep a third of the way to the keep ratio each, and score by redundancy.",),
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
