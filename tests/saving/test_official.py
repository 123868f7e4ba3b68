"""Official checkpoints: the same logits as the official inference, and clear refusals of everything else."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from tokenprune_timm.lvvit import LVViT
from torch import Tensor

import tokenprune
from tests.helpers.official import Layout, infer
from tests.helpers.tolerances import OFFICIAL
from tokenprune import CheckpointError, load_dynamicvit

DEIT = Layout(width=128, depth=4, heads=2, image_size=48, patch_size=8, classes=7)
LVVIT_T = Layout(width=240, depth=12, heads=4, image_size=96, classes=5, mlp_ratio=3, stem_channels=64)
LAYOUTS = {
    "DeiT": DEIT,
    "DeiT of other sizes": Layout(
        width=96, depth=8, heads=1, image_size=40, patch_size=8, classes=3, mlp_ratio=2, channels=1
    ),
    "DeiT-S": Layout(width=384, depth=12, heads=6, image_size=224, classes=1000),
    "LV-ViT-T": LVVIT_T,
    "LV-ViT-S": Layout(
        width=384, depth=16, heads=6, image_size=40, patch_size=8, classes=5, mlp_ratio=3, stem_channels=64, divisor=2.0
    ),
}
State = dict[str, Tensor]


@pytest.mark.parametrize("keep_ratio", [0.7, 0.5])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@torch.no_grad()
def test_logits_are_those_of_the_official_inference(layout: Layout, keep_ratio: float) -> None:
    state, images = layout.state(), layout.images()
    model = load_dynamicvit(state, keep_ratio=keep_ratio)
    logits = model(images)
    expected, left = infer(layout, state, images, keep_ratio)
    assert logits.shape == (3, layout.classes) and (logits - expected).abs().max() <= OFFICIAL
    for indices, positions in zip(model.tokenprune.trace.indices, left, strict=True):
        assert torch.equal(indices, positions)
    assert len({tuple(row.tolist()) for row in left[-1]}) > 1, "every image keeps the same positions"
    assert isinstance(model, LVViT) == bool(layout.stem_channels) and not model.training
    assert model.tokenprune.plan.stages == tuple(layout.stages)
    size = (layout.channels, layout.image_size, layout.image_size)
    assert timm.data.resolve_model_data_config(model)["input_size"] == size


@pytest.mark.parametrize(
    ("width", "depth", "divisor", "name"),
    [(240, 12, 1.0, "lvvit_t"), (384, 16, 2.0, "lvvit_s"), (512, 20, 2.0, "lvvit_m"), (768, 24, 3.0, "lvvit_l")],
)
def test_an_lvvit_is_recognised_by_its_sizes(width: int, depth: int, divisor: float, name: str) -> None:
    stem, heads = (128, 12) if name == "lvvit_l" else (64, {240: 4, 384: 6, 512: 8}[width])
    with torch.device("meta"):  # weights without values, which take long to draw
        weights = LVViT(img_size=32, embed_dim=width, depth=depth, num_heads=heads, num_classes=2, stem_channels=stem)
        model = tokenprune.backbones.adapters.model_of(weights.state_dict(), num_heads=None)
    assert model.pretrained_cfg["architecture"] == name
    assert {block.attn.num_heads for block in model.blocks} == {heads}
    assert {block.ls2.divisor for block in model.blocks} == {divisor}


WAYS: dict[str, Callable[[State], dict[str, Any]]] = {
    "model": lambda state: {"model": state, "epoch": 3, "args": argparse.Namespace(lr=1e-3)},
    "model_ema": lambda state: {"model_ema": state, "optimizer": {"state": {}}},
    "both": lambda state: {"model": {name: tensor + 1 for name, tensor in state.items()}, "model_ema": state},
    "state_dict": lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
    "state_dict_ema": lambda state: {"arch": "x", "state_dict_ema": state, "state_dict": {}},
    "bare": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
}


@pytest.mark.parametrize("way", WAYS)
def test_wherever_the_weights_are_nested(way: str, tmp_path: Path) -> None:
    state = DEIT.state()
    file = tmp_path / "checkpoint.pth.tar"
    torch.save(WAYS[way](state), file)
    for source in (str(file), WAYS[way](state)):
        loaded = load_dynamicvit(source).state_dict()
        assert len(loaded) == len(state) + 1  # and how it was sparsified
        assert torch.equal(loaded["norm.weight"], state["norm.weight"])
        last = "out_conv.4.bias"
        assert torch.equal(loaded[f"tokenprune.stages.2.scorer.{last}"], state[f"score_predictor.2.{last}"])


def test_other_formats_of_files_and_numbers(tmp_path: Path) -> None:
    state = DEIT.state()
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("model.safetensors", "old.pth"):
        assert torch.equal(load_dynamicvit(tmp_path / name).head.weight, state["head.weight"])
    half = load_dynamicvit({name: tensor.half() for name, tensor in state.items()})
    assert half.head.weight.dtype == torch.float32 and torch.equal(half.head.weight, state["head.weight"].half())


def test_what_is_not_in_the_weights_is_the_users() -> None:
    state = Layout(width=48, depth=6, heads=3, image_size=32, patch_size=8, classes=2, num_stages=2).state()
    with pytest.raises(CheckpointError, match=r"0 attention heads do not divide the width 48; pass num_heads="):
        load_dynamicvit(state)
    for odd in ("3", 3.0, True):
        with pytest.raises(CheckpointError, match="expected a whole number from 1"):
            load_dynamicvit(state, num_heads=odd, stages=(2, 4))  # type: ignore[arg-type]
    whole = {**state, "norm.bias": state["norm.bias"].long()}
    with pytest.raises(CheckpointError, match=r"norm\.bias holds numbers of torch\.int64"):
        load_dynamicvit(whole, num_heads=3, stages=(2, 4))
    for num_heads in (0, 5):
        with pytest.raises(CheckpointError, match=f"{num_heads} attention heads do not divide the width 48"):
            load_dynamicvit(state, num_heads=num_heads, stages=(2, 4))
    with pytest.raises(CheckpointError, match=r"has 2 predictor\(s\), .* pass stages=\(…\) with 2 block indices"):
        load_dynamicvit(state, num_heads=3)
    model = load_dynamicvit(state, num_heads=3, stages=(2, 4), keep_ratio=(0.5, 0.25))
    assert model.blocks[0].attn.num_heads == 3
    assert model.tokenprune.plan == tokenprune.Plan(stages=(2, 4), keep_ratios=(0.5, 0.25))
    with pytest.raises(tokenprune.PlanError, match=r"stages=\(1, 2, 3\): this checkpoint has 2 predictor\(s\)"):
        load_dynamicvit(state, num_heads=3, stages=(1, 2, 3))
    with pytest.raises(tokenprune.PlanError, match=r"keep ratio 1\.5"):
        load_dynamicvit(state, num_heads=3, stages=(2, 4), keep_ratio=1.5)


def _without(state: State, *names: str) -> State:
    return {name: tensor for name, tensor in state.items() if name not in names}


def _resnet() -> State:
    from torchvision.models import resnet18

    return resnet18().state_dict()


def _sparsified() -> State:
    return tokenprune.sparsify(timm.create_model("lvvit_t", img_size=32)).state_dict()


def _dense(name: str, **options: Any) -> State:
    return timm.create_model(name, **options).state_dict()


def _renumbered(state: State) -> State:
    return {name.replace("predictor.1", "predictor.3"): tensor for name, tensor in state.items()}


def _unpublished() -> State:
    return Layout(width=64, depth=4, heads=1, image_size=32, classes=2, stem_channels=8).state()


LAST = "score_predictor.1.out_conv.4.bias"
# Weights, and what the error says of them; "…" stands for any text, on several lines too.
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a ResNet": (
        _resnet,
        "neither DeiT's nor LV-ViT's…missing keys: cls_token, pos_embed…unexpected keys: conv1.weight, bn1.weight",
    ),
    "a Swin": (
        lambda: _dense("swin_tiny_patch4_window7_224"),
        "those of no Swin or ConvNeXt…missing keys: head.weight",  # it is head.fc.weight in timm's own
    ),
    "a dense DeiT": (
        lambda: _dense("deit_tiny_patch16_224"),
        "a dense VisionTransformer, without predictors. Load …tokenprune.sparsify(model), and train it.\n"
        "  missing keys: score_predictor.0.in_conv.0.weight, …and 18 more",
    ),
    "a dense LV-ViT": (lambda: _dense("lvvit_t", img_size=32), "a dense LVViT, without predictors"),
    "a distilled DeiT": (
        lambda: _dense("deit_tiny_distilled_patch16_224"),
        "unexpected keys: dist_token, head_dist.weight, head_dist.bias",
    ),
    "one of ours": (_sparsified, "a model that tokenprune sparsified… model.load_state_dict(state)"),
    "a key too few": (lambda: _without(DEIT.state(), "blocks.2.mlp.fc1.bias"), "missing keys: blocks.2.mlp.fc1.bias"),
    "a predictor's key too few": (
        lambda: _without(DEIT.state(), LAST),
        f"not those of a sparsified VisionTransformer.\n  missing keys: {LAST}",
    ),
    "a key too many": (
        lambda: {**DEIT.state(), "score_predictor.1.extra": torch.ones(1)},
        "unexpected keys: score_predictor.1.extra",
    ),
    "a predictor too few": (lambda: _renumbered(DEIT.state()), "missing keys: score_predictor.1.*"),
    "another shape": (
        lambda: {**DEIT.state(), "blocks.1.attn.proj.weight": torch.ones(128, 64)},
        "blocks.1.attn.proj.weight has shape (128, 64) instead of (128, 128)",
    ),
    "fewer dimensions": (
        lambda: {**DEIT.state(), "cls_token": torch.ones(128)},
        "cls_token has shape (128,); expected 3 dimensions",
    ),
    "positions of no square": (
        lambda: {**DEIT.state(), "pos_embed": torch.ones(1, 36, 128)},
        "pos_embed has 36 positions; … a square of patches",
    ),
    "an unpublished LV-ViT": (
        _unpublished,
        "an LV-ViT 64 wide with 4 blocks is none of lvvit_t (240 wide, 12 blocks)…residual_divisor",
    ),
    "no tensors": (
        lambda: {"epoch": 3, "args": {}},
        "the mapping holds the keys ['args', 'epoch'] and no state dict; …under state_dict_ema, model_ema",
    ),
    "nothing": (dict, "the mapping holds the keys [] and no state dict"),
    "not only tensors": (
        lambda: {**DEIT.state(), "best": 0.7},
        "other things than tensors.\n  unexpected keys: best",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_weights_are_refused(what: str) -> None:
    source, message = REFUSED[what]
    pattern = r"(.|\n)*".join(re.escape(part) for part in message.split("…"))
    with pytest.raises(CheckpointError, match=pattern):
        load_dynamicvit(source())


def test_the_error_has_the_keys() -> None:
    state = _without(DEIT.state(), "norm.weight", "norm.bias") | {"extra": torch.ones(1)}
    with pytest.raises(ValueError) as caught:  # the built-in that it is, too
        load_dynamicvit(state)
    assert isinstance(caught.value, CheckpointError)
    assert caught.value.missing == ("norm.weight", "norm.bias") and caught.value.unexpected == ("extra",)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_truncated_files_are_refused(new: bool, share: float, tmp_path: Path) -> None:
    file = tmp_path / "deit.pth"
    torch.save({"model": DEIT.state()}, file, _use_new_zipfile_serialization=new)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"the file deit\.pth \(\d+ bytes\) cannot be read; it is truncated"):
        load_dynamicvit(file)


@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html><html>", b"not found\n", b"\x00" * 300], ids=["html", "text", "0"]
)
@pytest.mark.parametrize("name", ["deit.pth", "deit.safetensors"])
def test_files_that_are_no_checkpoints_are_refused(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"the file {name} .* neither a PyTorch nor a \.safetensors file"):
        load_dynamicvit(tmp_path / name)


def test_a_truncated_safetensors_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "deit.safetensors"
    save_file(DEIT.state(), file)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="it is truncated or damaged"):
        load_dynamicvit(file)


class Touch:
    """Pickled, it makes a file wherever it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_never_run(how: str, tmp_path: Path) -> None:
    file, trace = tmp_path / "deit.pth", tmp_path / "code was here"
    content = {"model": DEIT.state(), "extra": Touch(trace)}
    if how == "pickle":
        file.write_bytes(pickle.dumps({"extra": Touch(trace)}, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(CheckpointError, match=r"objects besides tensors \(\w+\.mkdir\), .* it was not loaded"):
        load_dynamicvit(file)
    assert not trace.exists()


def test_whole_models_and_other_values_are_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(CheckpointError, match=r"objects besides tensors \(torch\.nn\.modules\.linear\.Linear\)"):
        load_dynamicvit(tmp_path / "module.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"the file list\.pth holds list and no state dict"):
        load_dynamicvit(tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="is a folder; pass the checkpoint file in it"):
        load_dynamicvit(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.pth"):
        load_dynamicvit(tmp_path / "nowhere.pth")


def test_an_adapter_that_builds_nothing_or_whose_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenprune_timm import TimmAdapter

    def missing(self: TimmAdapter, state: State, *, num_heads: int | None) -> None:
        raise ModuleNotFoundError("No module named 'timm'")

    monkeypatch.setattr(TimmAdapter, "from_state_dict", missing)
    with pytest.raises(CheckpointError, match=r"one of timm, which is not installed \(No module named 'timm'\)"):
        load_dynamicvit(DEIT.state())
    monkeypatch.delattr(TimmAdapter, "from_state_dict")
    with pytest.raises(CheckpointError, match="no installed adapter builds models from official checkpoints"):
        load_dynamicvit(DEIT.state())


def test_it_can_be_trained_further() -> None:
    state, images = DEIT.state(), DEIT.images()
    model = load_dynamicvit(state).train()
    model(images).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert tokenprune.verify(model, images).passed
