"""Loading: what is not let in, and what a save that fails leaves behind."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tokenprune
from tests.helpers.saved import SMALL, VIT, Mine, describe, manifest, same_outputs, save
from tests.helpers.zoo import BY_NAME, hook_counts
from tokenprune.saving import weights


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        file = folder / "tokenprune.safetensors"
        stored = load_file(file)
        change(stored)
        save_file(stored, file)

    return damage


def truncated(folder: Path) -> None:
    file = folder / "tokenprune.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def ties(text: str) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        file = folder / "tokenprune.safetensors"
        save_file(load_file(file), file, {"tokenprune.ties": text})

    return damage


def a_folder(folder: Path) -> None:
    (folder / "tokenprune.json").unlink()
    (folder / "tokenprune.json").mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "later version": (manifest(version=2, written_by={"tokenprune": "9.1"}), r"has version 2.*up to 1.*\(9\.1\)"),
    "no version": (manifest(version="1"), "its version is '1'"),
    "not JSON": (lambda folder: (folder / "tokenprune.json").write_text("{"), "it is not JSON"),
    "not text": (lambda folder: (folder / "tokenprune.json").write_bytes(b"\xff\xfe\x00"), "is not text"),
    "endless nesting": (lambda folder: (folder / "tokenprune.json").write_text("[" * 100_000), "it is not JSON"),
    "endless digits": (lambda folder: (folder / "tokenprune.json").write_text("1" * 5000), "it is not JSON"),
    "a folder in its place": (a_folder, "cannot be read: Is a directory"),
    "yes for a version": (manifest(version=True), "its version is True"),
    "other JSON": (lambda folder: (folder / "tokenprune.json").write_text("[1]"), "is not what tokenprune"),
    "an entry of another kind": (manifest(model__depth="six"), "depth='six'"),
    "later plan": (manifest(plan__version=7), "plan version 7 cannot be read"),
    "impossible plan": (manifest(plan__keep_ratios=[0.5, 1.5]), r"keep ratio 1\.5 is outside"),
    "plan for a deeper model": (manifest(plan__stages=[2, 40]), "stage 40 is out of range"),
    "unknown fate of tokens": (manifest(pruned="burn"), "pruned='burn'"),
    "unknown scorer": (manifest(scorer="oracle"), "'oracle' is not registered here"),
    "another scorer": (manifest(scorer="static"), "not what scorer='static' and pruned='drop' build"),
    "no manifest": (lambda folder: (folder / "tokenprune.json").unlink(), r"has no tokenprune\.json"),
    "no weights": (lambda folder: (folder / "tokenprune.safetensors").unlink(), "is missing"),
    "truncated weights": (truncated, "is damaged or truncated"),
    "empty weights": (lambda folder: (folder / "tokenprune.safetensors").write_bytes(b""), "is damaged"),
    "a missing tensor": (tensors(lambda stored: stored.pop("norm.weight")), r"1 missing: norm\.weight"),
    "a tensor too many": (tensors(lambda stored: stored.update(more=torch.ones(1))), "1 unexpected: more"),
    "a missing scorer": (
        tensors(lambda stored: stored.pop("tokenprune.stages.1.scorer.in_conv.1.bias")), r"1 missing: tokenprune\.",
    ),
    "ties of another kind": (ties("[[1, 2]]"), r"is damaged.*what it says of tied weights is '\[\[1, 2\]\]'"),
    "names of another kind": (ties('{"a": ["b"]}'), "what it says of tied weights"),
    "whole numbers": (
        tensors(lambda stored: stored.update({"norm.bias": stored["norm.bias"].long()})),
        r"1 of another kind: norm\.bias torch\.int64 instead of torch\.float32",
    ),
    "another shape": (tensors(lambda stored: stored.update({"norm.bias": torch.ones(2)})), r"m\.bias \(2,\) instead"),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(VIT.sparsified(), tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("given", [False, True], ids=["rebuilt", "given"])
def test_damaged_folders_are_refused_before_anything_changes(
    damage: Callable[[Path], None], message: str, given: bool, saved: Path, tmp_path: Path
) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    model = VIT.model()
    before, hooks = copy.deepcopy(model.state_dict()), hook_counts(model)
    with pytest.raises(tokenprune.CheckpointError, match=message):
        tokenprune.from_pretrained(tmp_path, model=model if given else None)
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert hook_counts(model) == hooks


@pytest.mark.parametrize(
    ("case", "change"),
    [("timm class token", {"model__identity__architecture": ["a"]}), ("torchvision", {"model__identity__stem": 3})],
)
def test_what_a_library_cannot_build_is_said(case: str, change: dict[str, Any], tmp_path: Path) -> None:
    folder = save(BY_NAME[case].sparsified(), tmp_path)
    manifest(**change)(folder)
    with pytest.raises(tokenprune.CheckpointError, match="builds no model from what was saved"):
        tokenprune.from_pretrained(folder)


@pytest.mark.parametrize("record", [None, 3, torch.tensor(10**14), torch.zeros(4), torch.zeros(2, 2).byte()])
def test_a_record_of_another_kind_is_damaged(record: Any) -> None:
    model = VIT.sparsified()
    with pytest.raises(RuntimeError, match=r"tokenprune\._extra_state: .* it is no row of bytes\. Take it out"):
        model.load_state_dict({**model.state_dict(), "tokenprune._extra_state": record})


OTHERS = {
    "shallower": (
        lambda: timm.create_model("vit_tiny_patch16_224", **{**SMALL, "depth": 5}),
        "12 unexpected: blocks.5",
    ),
    "wider": (lambda: timm.create_model("vit_tiny_patch16_224", **{**SMALL, "embed_dim": 64}), "of another shape"),
    "another class": (BY_NAME["torchvision"].model, "the saved weights are not those of this VisionTransformer"),
}


@pytest.mark.parametrize(("build", "message"), OTHERS.values(), ids=OTHERS)
def test_other_architectures_are_refused(build: Callable[[], nn.Module], message: str, saved: Path) -> None:
    model = build()
    before = hook_counts(model)
    with pytest.raises(tokenprune.CheckpointError, match=message):
        tokenprune.from_pretrained(saved, model=model)
    assert hook_counts(model) == before and "tokenprune" not in model._modules


def test_scorers_of_another_architecture_are_refused_and_of_other_weights_warned_of(tmp_path: Path) -> None:
    save(VIT.sparsified(), tmp_path, scorers_only=True)
    with pytest.raises(tokenprune.CheckpointError, match=r"of 6 blocks and width 32.* 5 blocks and width 32"):
        tokenprune.from_pretrained(tmp_path, model=timm.create_model("vit_tiny_patch16_224", **{**SMALL, "depth": 5}))
    dense = VIT.model()
    dense.head = nn.Linear(32, 2)  # scorers do not see it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenprune.from_pretrained(tmp_path, model=dense)
    with torch.no_grad():
        tokenprune.unsparsify(dense).blocks[5].norm1.weight.add_(1)
    with pytest.warns(UserWarning, match="do not have the very weights"):
        tokenprune.from_pretrained(tmp_path, model=dense)


def test_scorers_alone_fetch_the_public_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_model, fetched = timm.create_model, []

    def download(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            fetched.append((name, options["pretrained_cfg"]["tag"]))
            torch.manual_seed(5)
        return create_model(name, **options)

    monkeypatch.setattr(timm, "create_model", download)
    torch.manual_seed(5)
    public = create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    model = tokenprune.sparsify(public)
    loaded = tokenprune.from_pretrained(save(model, tmp_path, scorers_only=True))
    assert fetched == [("vit_tiny_patch16_224", "augreg_in21k_ft_in1k")]
    assert same_outputs(model, loaded, VIT, torch.randn(1, 3, 224, 224))

    with torch.no_grad():
        model.blocks[0].norm1.weight.add_(1)  # fine-tuned: no longer the public ones
    save(model, tmp_path, scorers_only=True)
    with pytest.raises(tokenprune.CheckpointError, match=r"do not have the very weights.*pass model="):
        tokenprune.from_pretrained(tmp_path)


def test_a_model_that_is_no_dense_one_is_refused(saved: Path) -> None:
    with pytest.raises(tokenprune.StateError, match="is sparsified already"):
        tokenprune.from_pretrained(saved, model=VIT.sparsified())
    with pytest.raises(tokenprune.CheckpointError, match=r"expected a torch\.nn\.Module"):
        tokenprune.from_pretrained(saved, model={})  # type: ignore[arg-type]
    with pytest.raises(tokenprune.CheckpointError, match="pass it as model="):
        tokenprune.from_pretrained(saved, backbone=describe(Mine()))
    with pytest.raises(tokenprune.StateError, match="not sparsified"):
        tokenprune.save_pretrained(VIT.model(), saved)


def test_a_state_that_is_no_tensor_is_refused_and_never_pickled(tmp_path: Path) -> None:
    class Stateful(nn.Identity):
        def get_extra_state(self) -> object:
            return {"a": 1}

        def set_extra_state(self, state: object) -> None:
            pass

    model = VIT.sparsified()
    model.head_drop = Stateful()
    with (
        pytest.warns(UserWarning),
        pytest.raises(tokenprune.CheckpointError, match=r"head_drop\._extra_state.*is a dict"),
    ):
        tokenprune.save_pretrained(model, tmp_path / "saved", model_card=False)
    assert not list(tmp_path.iterdir())


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.txt").write_text("epoch 1")
    first, second = VIT.sparsified(), VIT.sparsified()
    save(first, folder)
    second.tokenprune.keep_ratio = 0.3
    write = weights.write

    def fail(file: Path, named: Any) -> None:
        write(file, named)
        raise OSError("disk full")

    monkeypatch.setattr(weights, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        save(second, folder)
    monkeypatch.undo()
    assert tokenprune.from_pretrained(folder).tokenprune.keep_ratio == first.tokenprune.keep_ratio
    save(second, folder)
    assert tokenprune.from_pretrained(folder).tokenprune.keep_ratio == (0.3, 0.09)
    assert (folder / "log.txt").read_text() == "epoch 1" and [file.name for file in tmp_path.iterdir()] == ["run"]
    with pytest.raises(tokenprune.CheckpointError, match="is a file"):
        tokenprune.save_pretrained(first, folder / "log.txt")


def test_a_save_that_fails_while_moving_in_leaves_no_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = VIT.sparsified()
    folder = save(model, tmp_path / "run")
    replace = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if target.name == "tokenprune.json":
            raise OSError("power cut")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="power cut"):
        save(model, folder)
    with pytest.raises(tokenprune.CheckpointError, match=r"has no tokenprune\.json"):
        tokenprune.from_pretrained(folder)
