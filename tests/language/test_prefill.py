"""What reading a prompt costs: multiply-adds by part against closed forms, the cache, and times."""

from __future__ import annotations

import json

import pytest
import torch

import tokenprune
from tests.helpers.vision_language import CASES, NUM_IMAGES
from tokenprune.analysis.prefill import PARTS

WIDTH, INNER, WORDS, HEADS, LAYERS = 32, 64, 50, 2, 2


def language_macs(prompts: int, length: int, head_dim: int = 16, kv_heads: int = 2) -> int:
    """Of a small Llama: four projections, attention over all pairs, three layers of a gated MLP."""
    projections = WIDTH * head_dim * (2 * HEADS + 2 * kv_heads)
    attention = 2 * HEADS * head_dim * length
    return prompts * LAYERS * length * (projections + attention + 3 * WIDTH * INNER)


def test_multiply_adds_by_part_are_those_of_the_closed_form() -> None:
    case = next(case for case in CASES if case.family == "llava")
    model, inputs = case.model(), case.inputs()
    tokenprune.sparsify(model, (), 0.5)
    report = tokenprune.prefill_flops(model, inputs)
    length = inputs["input_ids"].shape[1]
    kept = model.tokenprune.trace.num_kept
    assert report.image_tokens == (108, 54) and report.prompt_tokens == (length, kept) and report.num_prompts == 3
    for counts, tokens in ((report.dense, length), (report.sparse, kept)):
        assert tuple(counts) == PARTS
        assert counts["language model"] == language_macs(3, tokens)
        assert counts["head"] == 3 * WIDTH * WORDS
        assert counts["projector"] >= 108 * 2 * WIDTH * WIDTH
    assert report.sparse["tower"] == report.dense["tower"]
    assert report.cache_bytes == tuple(3 * LAYERS * 2 * HEADS * 16 * 4 * tokens for tokens in (length, kept))
    assert report.ratio == pytest.approx(sum(report.dense.values()) / sum(report.sparse.values()))
    assert json.loads(report.to_json())["ratio"] == report.ratio and "54 image tokens" in str(report)
    assert report.table().row_count == 8


def test_stages_in_the_tower_are_counted_there() -> None:
    case = next(case for case in CASES if case.family == "internvl")
    model, inputs = tokenprune.sparsify(case.model(), (1, 2), (0.75, 0.5)), case.inputs()
    model.tokenprune.execution = "mask"
    report = tokenprune.prefill_flops(model, inputs)
    assert report.sparse["tower"] < 0.9 * report.dense["tower"]
    assert model.tokenprune.execution == "mask" and model.tokenprune.language.keep_ratio == 0.5
    assert report.image_tokens == (NUM_IMAGES * 9, NUM_IMAGES * 4)
    model.tokenprune.keep_ratio = 1.0
    same = tokenprune.prefill_flops(model, inputs)
    assert same.image_tokens == (27, 27) and same.sparse["language model"] == same.dense["language model"]


def test_times_have_the_random_baseline_beside_them() -> None:
    case = next(case for case in CASES if case.family == "qwen3_vl")
    model, inputs = tokenprune.sparsify(case.model(), (), 0.5), case.inputs()
    used: list[tuple[int, ...]] = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: used.append(kwargs["inputs_embeds"].shape), with_kwargs=True
    )
    done: list[tuple[int, int]] = []
    times = tokenprune.prefill_times(model, inputs, pairs=2, warmup=1, progress=lambda *now: done.append(now))
    model(**inputs)
    full, short = inputs["input_ids"].shape[1], used.pop()[1]
    # Dense, random, pruned; every other round backwards.
    assert [shape[1] for shape in used] == [short, short, full, full, short, short, short, short, full]
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert times.pruner == "diverse" and model.tokenprune.pruner_name == "diverse"
    assert len(times.dense_seconds) == len(times.random_seconds) == len(times.sparse_seconds) == 2
    assert "random" in str(times) and "diverse" in str(times)
    assert json.loads(times.to_json())["random_speedup"] == times.random_speedup
    with pytest.raises(ValueError, match="at least 2"):
        tokenprune.prefill_times(model, inputs, pairs=1)


def test_other_models_read_no_prompts() -> None:
    case = CASES[0]
    tower = tokenprune.sparsify(case.model().model.vision_tower, (1, 2), 0.5)
    with pytest.raises(tokenprune.StateError, match=r"tokenprune\.flops"):
        tokenprune.prefill_flops(tower, {"pixel_values": torch.zeros(1, 3, 48, 48)})
    model = tokenprune.sparsify(case.model(), (1, 2), 0.5)
    with pytest.raises(tokenprune.StateError, match="prefill_flops"):
        tokenprune.flops(model, (3, 48, 48))
    with pytest.raises(tokenprune.StateError, match="prefill_times"):
        tokenprune.throughput(model, (3, 48, 48))
