"""Throughput and verification: what they report, and that they leave the model as it was."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import einops
import pytest
import torch
from torch import Tensor, nn

import tokenprune
from tests.helpers.zoo import BY_NAME, Case, every_model
from tokenprune.analysis.benchmark import ThroughputReport


def state(model: nn.Module) -> tuple[object, ...]:
    sparsifier = model.tokenprune
    return (
        [module.training for module in model.modules()],
        [parameter.grad for parameter in model.parameters()],
        sparsifier.keep_ratio,
        sparsifier.execution,
        [stage.scorer for stage in sparsifier.stages],
    )


def test_throughput_reports_pairs() -> None:
    case = BY_NAME["timm class token"]
    model = case.sparsified().train()
    before = state(model)
    report = tokenprune.throughput(model, (3, 48, 48), batch_size=2, pairs=4, warmup=1)
    assert len(report.dense_seconds) == len(report.sparse_seconds) == 4 and report.keep_ratios == (0.6, 0.36)
    assert json.loads(report.to_json())["speedup"] == report.speedup
    assert str(report).endswith("at batch 2")
    assert state(model) == before
    for options in ({"pairs": 1}, {"warmup": -1}, {"batch_size": 0}):
        name, value = next(iter(options.items()))
        with pytest.raises(ValueError, match=f"{name}={value}"):
            tokenprune.throughput(model, **options)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_limit_is_that_of_a_shorter_sequence(frozen: bool) -> None:
    case = BY_NAME["timm registers, average with prefix"]
    model = case.sparsified()
    if frozen:
        tokenprune.freeze(model)
    before = state(model)
    lengths: list[int] = []
    model.blocks[-1].register_forward_hook(lambda block, args, output: lengths.append(output.shape[1]))
    report = tokenprune.throughput(model, (3, 48, 48), batch_size=1, pairs=2, warmup=0, limit=True)
    assert report.limit_seconds is not None and len(report.limit_seconds) == 2 and report.limit is not None
    assert json.loads(report.to_json())["limit"] == report.limit
    assert sorted(lengths[-6:]) == [15, 15, 15, 15, 39, 39]  # 3 prefix tokens, and 36 or 12 patch tokens
    assert state(model) == before and model.tokenprune.frozen is frozen
    refused = case.sparsified(pruned="preserve")
    assert tokenprune.throughput(refused, (3, 48, 48), batch_size=1, pairs=2, limit=True).limit is None


def test_throughput_takes_turns_in_who_begins_and_tells_progress() -> None:
    case = BY_NAME["timm class token"]
    model = case.sparsified()
    runs, steps = [], []
    model.register_forward_pre_hook(lambda model, args: runs.append(model.tokenprune.enabled))
    report = tokenprune.throughput(
        model, (3, 48, 48), batch_size=1, pairs=2, warmup=1, progress=lambda *done: steps.append(done)
    )
    assert runs == [True, False, False, True, True, False], "a pair to warm up and two that count"
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert report.dense_peak_bytes is report.sparse_peak_bytes is None, "a CPU does not count"


def test_throughput_tells_who_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense pass sleeps in whichever order it comes, so no time is booked on the wrong side."""
    case = BY_NAME["timm class token"]
    model = case.sparsified()
    clock = [0.0]

    def run(model: nn.Module, args: tuple[Tensor, ...]) -> None:
        clock[0] += 1.0 if model.tokenprune.enabled else 3.0

    model.register_forward_pre_hook(run)
    monkeypatch.setattr("tokenprune.analysis.runtimes.time.perf_counter", lambda: clock[0])
    report = tokenprune.throughput(model, (3, 48, 48), batch_size=2, pairs=4, warmup=0)
    assert report.dense_seconds == (3.0,) * 4 and report.sparse_seconds == (1.0,) * 4
    assert report.speedup == 3.0 and report.dense_latency == 3.0 and report.dense_images_per_second == 2 / 3


@pytest.mark.parametrize(
    ("sparse", "doubt"),
    [
        ((1.0,) * 7, "7 pairs are too few"),
        ((1.0,) * 8, None),
        ((1.0, 1.04) * 4, None),
        ((1.0, 1.2) * 4, r"too noisy: the middle half of the speed-ups spans \d\d% of their median, more than 10%"),
        ((1.0,) * 7 + (9.0,), None),  # one pair that was disturbed
    ],
)
def test_noise_that_hides_the_result_is_told(sparse: tuple[float, ...], doubt: str | None) -> None:
    report = ThroughputReport(
        input_size=(3, 8, 8),
        batch_size=1,
        keep_ratios=(0.5,),
        dense_seconds=(1.5,) * len(sparse),
        sparse_seconds=sparse,
    )
    assert (report.doubt is None) == (doubt is None)
    if doubt is not None:
        assert re.search(doubt, str(report.doubt))
    assert json.loads(report.to_json())["doubt"] == report.doubt


def test_throughput_figures_are_medians_of_pairs() -> None:
    report = ThroughputReport(
        input_size=(3, 8, 8),
        batch_size=10,
        keep_ratios=(0.5,),
        dense_seconds=(2.0, 4.0, 8.0),
        sparse_seconds=(1.0, 1.0, 4.0),
    )
    assert report.dense_images_per_second == 2.5 and report.sparse_images_per_second == 10
    assert report.speedups == (2.0, 4.0, 2.0) and report.speedup == 2.0 and report.spread == (2.0, 4.0)


@every_model
def test_every_model_passes_verification(case: Case) -> None:
    model, images = case.sparsified(), case.images()
    before = state(model)
    inputs = {"pixel_values": images, **case.forward_arguments} if case.name.startswith("transformers") else images
    report = tokenprune.verify(model, inputs)
    assert report.passed, str(report)
    assert len(report.gradients) == 2 and report.compared >= 1
    assert state(model) == before


class Block(nn.Module):
    """A research block that is not anybody's."""

    def __init__(self, written_out: str = "", pool: bool = False) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(16), nn.Linear(16, 48)
        self.written_out, self.pool = written_out, pool

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, dim=-1)
        if self.written_out:
            scores = query @ key.transpose(-1, -2) / 4
            attended = (scores.softmax(dim=-1) if self.written_out == "softmax" else scores.sigmoid()) @ value
        else:
            attended = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        if self.pool:
            x = x + x.mean(dim=1, keepdim=True)
        return x + attended.squeeze(1)


TAILS = {
    "mean": lambda x: x.mean(dim=1),
    "maximum": lambda x: x.max(dim=1).values,
    "sum": lambda x: x.sum(dim=1),
    "mean of the last axis": lambda x: x.transpose(1, 2).mean(-1),
    "adaptive pool": lambda x: torch.nn.functional.adaptive_avg_pool1d(x.transpose(1, 2), 1).squeeze(-1),
    "einops": lambda x: einops.reduce(x, "b n c -> b c", "mean"),
    "median": lambda x: x.median(dim=1).values,
    "deviation": lambda x: x.std(1),
}


class Research(nn.Module):
    def __init__(self, tail: str = "mean", **options: Any) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 8, 8)
        self.blocks = nn.ModuleList([Block(**options) for _ in range(4)])
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return TAILS[self.tail](x)


def research(**options: object) -> nn.Module:
    model = Research(**options)  # type: ignore[arg-type]
    backbone = tokenprune.Backbone(blocks=model.blocks, num_prefix_tokens=0, embed_dim=16)
    return tokenprune.sparsify(model, (1, 2), 0.5, backbone=backbone)


def test_decisions_are_tried_that_differ_between_images() -> None:
    model = research()
    seen: list[Tensor] = []
    model.register_forward_hook(
        lambda model, args, output: seen.extend(model.tokenprune.trace.indices if model.tokenprune.trace else [])
    )
    tokenprune.verify(model, torch.randn(3, 3, 48, 48))
    kept = [set(row.tolist()) for row in seen[-1]]
    assert len(seen) >= 2 and all(len(one & other) < 0.8 * len(one) for one, other in ((kept[0], kept[1]), kept[1:]))


def test_a_model_of_ones_own_with_a_backbone_of_three_lines() -> None:
    report = tokenprune.verify(research(), torch.randn(2, 3, 48, 48))
    assert report.passed, str(report)


@pytest.mark.parametrize("tail", ["maximum", "mean of the last axis", "adaptive pool", "einops"])
def test_tails_that_pool_in_other_words(tail: str) -> None:
    report = tokenprune.verify(research(tail=tail), torch.randn(2, 3, 48, 48))
    assert report.passed, str(report)


@pytest.mark.parametrize("tail", ["median", "deviation"])
def test_a_tail_that_reduces_tokens_in_an_unknown_way_is_an_error(tail: str) -> None:
    with pytest.raises(tokenprune.InterceptionError, match="downstream='all tokens' in the Backbone"):
        tokenprune.verify(research(tail=tail), torch.randn(2, 3, 48, 48))


def test_an_output_that_is_not_a_number_is_found_out() -> None:
    model = research()
    model.register_forward_hook(
        lambda model, args, output: (output, output * (math.nan if model.tokenprune.execution == "mask" else 1))
    )
    assert not tokenprune.verify(model, torch.randn(2, 3, 48, 48)).passed


def test_attention_modules_that_are_not_called_are_an_error() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention.forward(x)  # past the hooks

    model = Research()
    model.blocks = nn.ModuleList([Hidden() for _ in range(4)])
    backbone = tokenprune.Backbone(
        blocks=model.blocks,
        num_prefix_tokens=0,
        embed_dim=16,
        attentions=[(block.attention,) for block in model.blocks],
    )
    tokenprune.sparsify(model, (1, 2), 0.5, backbone=backbone).train()
    with pytest.raises(tokenprune.InterceptionError, match="Hidden never called the attention modules"):
        model(torch.randn(2, 3, 48, 48))


def test_a_tail_that_sums_pruned_tokens_is_found_out() -> None:
    report = tokenprune.verify(research(tail="sum"), torch.randn(2, 3, 48, 48))
    assert not report.passed and "executions differ" in str(report)


def test_a_block_that_mixes_tokens_outside_attention_is_found_out() -> None:
    report = tokenprune.verify(research(pool=True), torch.randn(2, 3, 48, 48))
    assert not report.passed and report.failures[0].startswith("for the same decisions")


def test_attention_that_is_written_out_is_masked_in_its_softmax() -> None:
    report = tokenprune.verify(research(written_out="softmax"), torch.randn(2, 3, 48, 48))
    assert report.passed, str(report)


def test_attention_that_cannot_be_intercepted_is_an_error() -> None:
    with pytest.raises(tokenprune.InterceptionError, match="the attention of Block passed neither through"):
        tokenprune.verify(research(written_out="sigmoid"), torch.randn(2, 3, 48, 48))


def test_an_output_of_which_the_tokens_left_do_not_explain_the_shape_is_found_out() -> None:
    model = research()
    model.register_forward_hook(lambda model, args, output: (output, output[: 1 if model.tokenprune.trace else 2]))
    report = tokenprune.verify(model, torch.randn(2, 3, 48, 48))
    assert report.failures == (
        "output[1]: the shape differs pruned and unpruned in a way that the tokens left do not explain",
    )


def test_a_frozen_scorer_is_found_out() -> None:
    model = research()
    model.tokenprune.stages[0].scorer.forward = lambda candidates: candidates.patches.detach().sum(dim=-1)
    report = tokenprune.verify(model, torch.randn(2, 3, 48, 48))
    assert report.failures == ("a parameter of stage 0 gets no finite gradient",)
