"""`benchmarks.peers`: that the peers are what the papers say, and that figures of several runs come together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import tokenprune
from benchmarks import measuring, peers
from benchmarks.written_out import DynamicViT, ToMe
from tests.helpers.tolerances import FROZEN, TOME
from tests.helpers.tome import tome_tokens
from tests.helpers.zoo import BY_NAME
from tokenprune.analysis.runtimes import Runtime, Timers, eager, twin

SIZES = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 8, "num_heads": 2}


def small() -> Any:
    """A DeiT whose tokens differ, as those of a trained one do."""
    torch.manual_seed(1)
    model = timm.create_model("deit_small_patch16_224", **SIZES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def test_dynamicvit_written_out_is_ours_with_the_same_weights() -> None:
    case = BY_NAME["timm class token"]
    ours, images = case.sparsified(), case.images()
    plan = ours.tokenprune.plan
    num_keep = dict(zip(plan.stages, plan.num_keep(36), strict=True))
    states = [stage.scorer.state_dict() for stage in ours.tokenprune.stages]
    peer = DynamicViT(case.model(), num_keep, dict(zip(plan.stages, states, strict=True))).eval()
    expected = ours(images)
    assert (peer(images) - expected).abs().max() <= FROZEN * expected.abs().max()
    assert (peer(images) - case.model()(images)).abs().max() > 1e-3


@pytest.mark.parametrize("r", [3, 8])  # with 8 there are not always so many
@torch.no_grad()
def test_tome_written_out_is_the_slow_one(r: int) -> None:
    model, images = small(), torch.randn(3, 3, 48, 48)
    peer = ToMe(model, r)
    tokens, sizes = peer.tokens(images)
    expected, counted = tome_tokens(model, images, r)
    assert tokens.shape == expected.shape and torch.equal(sizes.sum(dim=1), counted.sum(dim=1, keepdim=True))
    torch.testing.assert_close(tokens[:, 0], expected[:, 0], rtol=0, atol=TOME)
    order, reference = tokens[..., 0].argsort(dim=1), expected[..., 0].argsort(dim=1)  # they stand in another order
    for b in range(3):
        torch.testing.assert_close(tokens[b, order[b]], expected[b, reference[b]], rtol=0, atol=TOME)
        assert torch.equal(sizes[b, order[b], 0], counted[b, reference[b]])
    torch.testing.assert_close(peer(images), model.forward_head(expected))
    with pytest.raises(ValueError, match="0 prefix tokens: expected"):
        ToMe(timm.create_model("vit_base_patch16_siglip_224", **SIZES), r)


def test_tome_merges_as_many_as_cost_the_same() -> None:
    dense = small()
    sparse = tokenprune.sparsify(twin(dense), keep_ratio=0.7)
    counted = tokenprune.flops(sparse, (3, 48, 48))
    r = peers.merged_by_block(dense, counted.sparse / counted.dense)
    ratios = tokenprune.tome_keep_ratios(36, r=r, num_stages=8)
    merged = tokenprune.sparsify(twin(dense), range(8), ratios, scorer="tome", pruned="merge_sizes")
    assert tokenprune.flops(merged, (3, 48, 48)).sparse == pytest.approx(counted.sparse, rel=0.05)


def test_figures_of_several_runs_come_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "RESULTS", tmp_path)
    monkeypatch.setattr(peers, "PICTURES", tmp_path)
    dense = small()
    monkeypatch.setattr(timm, "create_model", lambda name: twin(dense))
    options: dict[str, Any] = {"runtime": ["eager"], "pairs": 4, "name": "tried"}
    peers.main(**options, batch_size=[1, 2])
    first = json.loads((tmp_path / "tried.json").read_text())["data"]
    assert len(first) == 18 and {entry["what"][:4] for entry in first} == {"sequ", "Dyna", "ToMe", "ours"}
    assert all(entry["of_limit"] == 1 for entry in first if entry["what"] == peers.CUT)
    peers.main(**options, batch_size=[2], take=2)
    peers.main(**options, batch_size=[2], take=2)  # replaces
    every = json.loads((tmp_path / "tried.json").read_text())["data"]
    assert len(every) == 27 and [entry for entry in every if entry["take"] == 1] == first
    lines = (tmp_path / "tried.md").read_text().splitlines()
    assert "taken twice" in lines[0] and sum(line.startswith("| eager") for line in lines) == 18
    assert all(line.count(" / ") == (3 if line.startswith("| eager | 2 |") else 0) for line in lines[4:])
    assert (tmp_path / "tried.png").read_bytes().startswith(b"\x89PNG")


def test_models_are_timed_in_groups_where_all_take_too_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []

    def runtime_named(name: str) -> Runtime:
        def run(models: Sequence[nn.Module], size: Sequence[int]) -> AbstractContextManager[Timers]:
            numbers.append(len(models))
            return eager(models, size)

        return run

    monkeypatch.setattr(peers, "runtime_named", runtime_named)
    settings: dict[str, Any] = {"runtime": "eager", "device": "cpu", "dtype": "float32", "pairs": 1}
    alone = peers.measure(small(), 0.7, batch_sizes=[16], at_once=3, **settings)
    assert numbers == [5, 5, 4]
    together = peers.measure(small(), 0.7, batch_sizes=[16], **settings)
    assert numbers[3:] == [10]
    assert [one.what for one in alone] == [one.what for one in together]


def test_every_runtime_has_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(peers.subprocess, "run", lambda command, check: started.append(command))
    peers.main(batch_size=[1, 256], device="cuda", at_once=2, name="other")
    assert [command[3] for command in started] == ["--runtime=eager", "--runtime=compile", "--runtime=onnx"]
    for command in started:
        assert {"--batch-size=1", "--batch-size=256", "--device=cuda", "--name=other"} <= set(command)
        assert {"--take=1", "--at-once=2"} <= set(command)
