"""Saving, loading and sharing: what comes back is what went in, and nothing else is let in."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tokenprune
from tests.zoo import BY_NAME, Case, hook_counts, some_models
from tokenprune.saving import weights
from tokenprune.scorers import base as scorers

SMALL = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2, "num_classes": 7}
VIT = BY_NAME["timm class token"]


def save(model: nn.Module, folder: Path, **options: Any) -> Path:
    """Without a warning, and without the card, which takes long."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return tokenprune.save_pretrained(model, folder, **{"model_card": False, **options})


def same_outputs(one: nn.Module, other: nn.Module, case: Case, images: Tensor | None = None) -> bool:
    images = case.images() if images is None else images
    with torch.no_grad():
        before, after = case.run(one.eval(), images), case.run(other.eval(), images)
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


# What comes back


@some_models
def test_a_model_comes_back_with_weights_plan_and_scorer(case: Case, tmp_path: Path) -> None:
    model = case.sparsified()
    keys = list(model.state_dict())
    loaded = tokenprune.from_pretrained(save(model, tmp_path / "saved"))
    assert type(loaded) is type(model) and loaded is not model and not loaded.training
    assert same_outputs(model, loaded, case)
    assert loaded.tokenprune.plan == model.tokenprune.plan and loaded.tokenprune.scorer == "predictor"
    assert list(model.state_dict()) == keys
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == ["tokenprune.json", "tokenprune.safetensors"]
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]


@some_models
def test_scorers_alone_come_back_beside_a_dense_model(case: Case, tmp_path: Path) -> None:
    model = case.sparsified()
    folder = save(model, tmp_path / "saved", scorers_only=True)
    assert all(name.startswith("tokenprune.stages.") for name in load_file(folder / "tokenprune.safetensors"))
    dense = case.model()
    assert tokenprune.from_pretrained(folder, model=dense) is dense
    assert same_outputs(model, dense, case)
    assert dense.tokenprune.plan == model.tokenprune.plan


@pytest.mark.parametrize("scorer", ["predictor", "static", "random"])
def test_every_scorer_comes_back(scorer: str, tmp_path: Path) -> None:
    model = VIT.sparsified(scorer=scorer)
    model.tokenprune.keep_ratio = 0.45  # the ratio of now, not that of then
    loaded = tokenprune.from_pretrained(save(model, tmp_path))
    assert loaded.tokenprune.scorer == scorer and loaded.tokenprune.keep_ratio == (0.45, 0.45**2)
    torch.manual_seed(1)
    with torch.no_grad():
        expected = model(VIT.images())
        torch.manual_seed(1)
        assert torch.equal(loaded(VIT.images()), expected)


TIMM = {
    "as it is": ("vit_tiny_patch16_224", {}),
    "other classes, regularised": ("vit_tiny_patch16_224", {"num_classes": 3, "drop_path_rate": 0.1, "drop_rate": 0.2}),
    "a pretrained tag": ("vit_tiny_patch16_224.augreg_in21k", {"num_classes": 5}),
    "other sizes": ("vit_tiny_patch16_224", SMALL),
    "other heads": ("vit_tiny_patch16_224", {**SMALL, "num_heads": 4}),
    "one channel, no head, average": ("deit_tiny_patch16_224", {"in_chans": 1, "num_classes": 0, "global_pool": "avg"}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"num_classes": 4}),
    "registers, layer scale": ("vit_tiny_patch16_224", {**SMALL, "reg_tokens": 4, "init_values": 0.3, "qk_norm": True}),
    "norm before an average": ("vit_tiny_patch16_224", {**SMALL, "global_pool": "avg", "fc_norm": False}),
    "any size": ("vit_tiny_patch16_224", {**SMALL, "dynamic_img_size": True}),
    "rotary": ("eva02_tiny_patch14_224", {"num_classes": 6}),
}


@pytest.mark.parametrize(("name", "options"), TIMM.values(), ids=TIMM)
def test_options_of_timm_are_found_on_the_model(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = tokenprune.sparsify(timm.create_model(name, **options), keep_ratio=0.5, stages=(2, 4))
    loaded = tokenprune.from_pretrained(save(model, tmp_path))
    assert repr(loaded) == repr(model)
    # The tag decides on preprocessing.
    assert loaded.pretrained_cfg["tag"] == model.pretrained_cfg["tag"]
    images = torch.randn(2, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    assert same_outputs(model, loaded, VIT, images)


@pytest.mark.parametrize("change", ["reset_classifier", "another layer"])
def test_a_head_that_was_replaced_comes_back(change: str, tmp_path: Path) -> None:
    model = VIT.sparsified()
    if change == "reset_classifier":
        model.reset_classifier(11)
    else:
        model.head = nn.Linear(32, 11)
    loaded = tokenprune.from_pretrained(save(model, tmp_path))
    assert same_outputs(model, loaded, VIT) and loaded.num_classes == model.num_classes


TORCHVISION_HEADS: dict[str, Callable[[Any], None]] = {
    "last layer": lambda model: setattr(model.heads, "head", nn.Linear(32, 11)),
    "a plain layer": lambda model: setattr(model, "heads", nn.Linear(32, 11)),
    "none": lambda model: setattr(model, "heads", nn.Identity()),
}


@pytest.mark.parametrize("change", TORCHVISION_HEADS.values(), ids=TORCHVISION_HEADS)
def test_heads_of_torchvision_come_back(change: Callable[[Any], None], tmp_path: Path) -> None:
    case = BY_NAME["torchvision"]
    model = case.sparsified()
    change(model)
    assert same_outputs(model, tokenprune.from_pretrained(save(model, tmp_path)), case)


def test_a_convolutional_stem_of_torchvision_comes_back(tmp_path: Path) -> None:
    from torchvision.models import VisionTransformer
    from torchvision.models.vision_transformer import ConvStemConfig

    stem = [ConvStemConfig(8, 3, 2), ConvStemConfig(16, 3, 2, activation_layer=nn.SiLU), ConvStemConfig(32, 3, 2)]
    model = VisionTransformer(48, 8, 6, 2, 32, 64, dropout=0.1, conv_stem_configs=stem, num_classes=7)
    tokenprune.sparsify(model, (2, 4), 0.6)
    assert same_outputs(model, tokenprune.from_pretrained(save(model, tmp_path)), BY_NAME["torchvision"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["timm class token", "transformers ViT classifier", "torchvision"])
def test_dtypes_are_kept(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = BY_NAME[name]
    model = case.sparsified(dtype)
    loaded = tokenprune.from_pretrained(save(model, tmp_path))
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert same_outputs(model, loaded, case, case.images(dtype=dtype))


def test_mixed_dtypes_and_buffers_that_are_not_saved_are_kept(tmp_path: Path) -> None:
    rotary = timm.create_model("vit_medium_patch16_rope_reg1_gap_256", depth=4, embed_dim=64, num_heads=2)
    tokenprune.sparsify(rotary, (1, 2), 0.5).bfloat16()
    rotary.norm.float()
    loaded = tokenprune.from_pretrained(save(rotary, tmp_path))
    assert {n: t.dtype for n, t in rotary.named_buffers()} == {n: t.dtype for n, t in loaded.named_buffers()}
    assert {n: t.dtype for n, t in rotary.named_parameters()} == {n: t.dtype for n, t in loaded.named_parameters()}


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = Mine()
        model.blocks[1].mlp.weight = model.blocks[0].mlp.weight
        return model

    model = own(tied())
    with pytest.warns(UserWarning, match="will need model="):
        tokenprune.save_pretrained(model, tmp_path, model_card=False)
    stored = load_file(tmp_path / "tokenprune.safetensors")
    assert "blocks.0.mlp.weight" in stored and "blocks.1.mlp.weight" not in stored
    into = tied()
    loaded = tokenprune.from_pretrained(tmp_path, model=into, backbone=describe(into))
    assert loaded.blocks[1].mlp.weight is loaded.blocks[0].mlp.weight
    assert torch.equal(loaded.eval()(IMAGES), model.eval()(IMAGES))


def test_a_wrapped_model_is_saved_like_the_one_inside(tmp_path: Path) -> None:
    model = VIT.sparsified()
    loaded = tokenprune.from_pretrained(save(torch.compile(model), tmp_path))
    assert same_outputs(model, loaded, VIT)


def test_saving_and_loading_leave_random_numbers_and_the_model_alone(tmp_path: Path) -> None:
    model = VIT.sparsified(scorer="random").train()
    before, hooks = torch.random.get_rng_state(), hook_counts(model)
    save(model, tmp_path, model_card=True)
    assert model.training and hook_counts(model) == hooks
    tokenprune.from_pretrained(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


# Models that nobody can build, and scorers without a name

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn, self.mlp = nn.MultiheadAttention(dim, 2, batch_first=True), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x + self.attn(x, x, x, need_weights=False)[0])


class Mine(nn.Module):
    """A user's model."""

    def __init__(self, dim: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, dim, 8, 8), nn.Linear(dim, 5)
        self.blocks = nn.ModuleList([Block(dim) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


def describe(model: Mine) -> tokenprune.Backbone:
    return tokenprune.Backbone(blocks=model.blocks, num_prefix_tokens=0, embed_dim=model.embed.out_channels)


def own(model: Any) -> nn.Module:
    return tokenprune.sparsify(model, (1,), 0.5, backbone=describe(model))


@pytest.mark.parametrize("scorers_only", [False, True])
def test_a_model_of_ones_own_is_saved_and_loads_into_one(scorers_only: bool, tmp_path: Path) -> None:
    model = own(Mine()).eval()
    with pytest.warns(UserWarning, match=r"will need model=.*no installed adapter can build a .*Mine"):
        tokenprune.save_pretrained(model, tmp_path, scorers_only=scorers_only)
    with pytest.raises(tokenprune.CheckpointError, match="pass model=, the dense model to load into"):
        tokenprune.from_pretrained(tmp_path)
    into = Mine()
    if scorers_only:
        dense = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("tokenprune.")}
        into.load_state_dict(dense)
    assert tokenprune.from_pretrained(tmp_path, model=into, backbone=describe(into)) is into
    assert into.training and torch.equal(into.eval()(IMAGES), model(IMAGES))


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "another layer": (lambda m: setattr(m, "norm", nn.GroupNorm(1, 32)), "norm is a GroupNorm instead of a LayerNorm"),
    "a layer more": (lambda m: setattr(m.blocks[0], "adapter", nn.Linear(1, 1)), "blocks.0.adapter has been added"),
    "another number": (lambda m: setattr(m.blocks[1].norm1, "eps", 0.1), "blocks.1.norm1.eps is 0.1 instead of 1e-06"),
    "a tie": (lambda m: setattr(m.blocks[1].norm1, "weight", m.blocks[0].norm1.weight), "other parameters are tied"),
    "a forward": (lambda m: setattr(m, "forward", m.forward_features), "the model has a forward of its own"),
    "another parameter": (
        lambda m: setattr(m, "pos_embed", nn.Parameter(torch.zeros(1, 1, 32))), r"pos_embed has shape \(1, 1, 32\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_model_that_was_changed_is_not_taken_for_the_librarys(
    change: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    model = VIT.sparsified()
    change(model)
    with pytest.warns(UserWarning, match=message):
        tokenprune.save_pretrained(model, tmp_path, model_card=False)
    with pytest.raises(tokenprune.CheckpointError, match=message):
        tokenprune.from_pretrained(tmp_path)


def test_what_is_only_switched_on_a_model_does_not_matter(tmp_path: Path) -> None:
    model = VIT.sparsified()
    model.set_grad_checkpointing()
    assert same_outputs(model, tokenprune.from_pretrained(save(model, tmp_path)), VIT)


class Norm(tokenprune.Scorer):
    """Scores by length, with a weight of its own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, candidates: tokenprune.Candidates) -> Tensor:
        return (candidates.patches * self.weight).norm(dim=-1)


def build_norm(context: tokenprune.ScorerContext) -> Norm:
    return Norm(context.embed_dim)


def test_a_scorer_without_a_name_is_passed_again(tmp_path: Path) -> None:
    model = VIT.sparsified(scorer=build_norm)
    with pytest.warns(UserWarning, match="will need scorer=builder"):
        tokenprune.save_pretrained(model, tmp_path, model_card=False)
    with pytest.raises(tokenprune.CheckpointError, match="pass scorer=, the callable"):
        tokenprune.from_pretrained(tmp_path)
    with pytest.raises(tokenprune.CheckpointError, match="not what scorer='predictor' builds"):
        tokenprune.from_pretrained(tmp_path, scorer="predictor")
    assert same_outputs(model, tokenprune.from_pretrained(tmp_path, scorer=build_norm), VIT)


def test_a_scorer_with_a_name_is_found_where_it_is_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers, "_BUILDERS", dict(scorers._BUILDERS))
    tokenprune.register_scorer("norm")(build_norm)
    model = VIT.sparsified(scorer=build_norm)
    assert same_outputs(model, tokenprune.from_pretrained(save(model, tmp_path)), VIT)
    del scorers._BUILDERS["norm"]
    with pytest.raises(tokenprune.CheckpointError, match="'norm' is not registered here"):
        tokenprune.from_pretrained(tmp_path)


def test_a_scorer_that_was_replaced_has_no_name(tmp_path: Path) -> None:
    model = VIT.sparsified()
    for stage in model.tokenprune.stages:
        stage.scorer = Norm(32)
    with pytest.warns(UserWarning, match="will need scorer=builder"):
        tokenprune.save_pretrained(model, tmp_path, model_card=False)
    assert same_outputs(model, tokenprune.from_pretrained(tmp_path, scorer=build_norm), VIT)


# What is not let in


def manifest(**changes: Any) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        file = folder / "tokenprune.json"
        fields = json.loads(file.read_text())
        for path, value in changes.items():
            inner = fields
            *outer, last = path.split("__")
            for name in outer:
                inner = inner[name]
            inner[last] = value
        file.write_text(json.dumps(fields))

    return damage


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


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "later version": (manifest(version=2, written_by={"tokenprune": "9.1"}), r"has version 2.*up to 1.*\(9\.1\)"),
    "no version": (manifest(version="1"), "its version is '1'"),
    "not JSON": (lambda folder: (folder / "tokenprune.json").write_text("{"), "it is not JSON"),
    "not text": (lambda folder: (folder / "tokenprune.json").write_bytes(b"\xff\xfe\x00"), "is not text"),
    "other JSON": (lambda folder: (folder / "tokenprune.json").write_text("[1]"), "is not what tokenprune"),
    "an entry of another kind": (manifest(model__depth="six"), "depth='six'"),
    "later plan": (manifest(plan__version=7), "plan version 7 cannot be read"),
    "impossible plan": (manifest(plan__keep_ratios=[0.5, 1.5]), r"keep ratio 1\.5 is outside"),
    "plan for a deeper model": (manifest(plan__stages=[2, 40]), "stage 40 is out of range"),
    "unknown fate of tokens": (manifest(pruned="burn"), "pruned='burn'"),
    "unknown scorer": (manifest(scorer="oracle"), "'oracle' is not registered here"),
    "another scorer": (manifest(scorer="static"), "not what scorer='static' builds"),
    "no manifest": (lambda folder: (folder / "tokenprune.json").unlink(), r"has no tokenprune\.json"),
    "no weights": (lambda folder: (folder / "tokenprune.safetensors").unlink(), "is missing"),
    "truncated weights": (truncated, "is damaged or truncated"),
    "empty weights": (lambda folder: (folder / "tokenprune.safetensors").write_bytes(b""), "is damaged"),
    "a missing tensor": (tensors(lambda stored: stored.pop("norm.weight")), r"1 missing: norm\.weight"),
    "a tensor too many": (tensors(lambda stored: stored.update(more=torch.ones(1))), "1 unexpected: more"),
    "a missing scorer": (
        tensors(lambda stored: stored.pop("tokenprune.stages.1.scorer.in_conv.1.bias")), r"1 missing: tokenprune\.",
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


# What transformers writes by itself


@pytest.mark.parametrize("name", ["transformers ViT", "transformers ViT classifier", "transformers SigLIP"])
def test_what_transformers_saves_of_a_sparsified_model_loads_back(name: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    model: Any = case.sparsified()
    model.tokenprune.keep_ratio = 0.4
    model.save_pretrained(tmp_path)
    loaded = tokenprune.from_pretrained(tmp_path)
    assert loaded.tokenprune.keep_ratio == (0.4, 0.4**2) and same_outputs(model, loaded, case)
    into = case.model()
    with torch.no_grad():
        next(into.parameters()).add_(0.1)
    assert same_outputs(model, tokenprune.from_pretrained(tmp_path, model=into), case)
    # To transformers it is the dense model that it was.
    dense = type(model).from_pretrained(tmp_path)
    with tokenprune.dense(model):
        assert same_outputs(model, dense, case)


def test_a_tower_that_transformers_does_not_export_comes_back(tmp_path: Path) -> None:
    from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
    from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

    case = BY_NAME["transformers SigLIP"]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2}
    config = Idefics2VisionConfig(image_size=48, patch_size=8, **sizes)
    model = tokenprune.sparsify(Idefics2VisionTransformer(config).eval(), (2, 4), 0.6)
    assert same_outputs(model, tokenprune.from_pretrained(save(model, tmp_path)), case)


def test_no_folder_of_this_machine_is_written_down(tmp_path: Path) -> None:
    dense: Any = BY_NAME["transformers ViT classifier"].model()
    dense.save_pretrained(tmp_path / "dense")
    model = tokenprune.sparsify(type(dense).from_pretrained(tmp_path / "dense"), (2, 4))
    save(model, tmp_path / "sparse")
    assert str(tmp_path) not in (tmp_path / "sparse" / "tokenprune.json").read_text()
    model.config._name_or_path = "google/vit-base-patch16-224"
    tokenprune.save_pretrained(model, tmp_path / "sparse")
    assert "base_model: google/vit-base-patch16-224" in (tmp_path / "sparse" / "README.md").read_text()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("class", "os.path.PurePath", "has no model 'os.path.PurePath'"),
        ("class", "transformers.models.nothing.Model", "has no model"),
        ("config", {"hidden_size": "wide"}, "does not build this ViTForImageClassification"),
    ],
)
def test_an_identity_that_is_none_is_refused(path: str, value: Any, message: str, tmp_path: Path) -> None:
    save(BY_NAME["transformers ViT classifier"].sparsified(), tmp_path)
    manifest(**{f"model__identity__{path}": value})(tmp_path)
    with pytest.raises(tokenprune.CheckpointError, match=message):
        tokenprune.from_pretrained(tmp_path)


def test_a_library_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(VIT.sparsified(), tmp_path)
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not there
    with pytest.raises(tokenprune.CheckpointError, match="timm is needed to build this model"):
        tokenprune.from_pretrained(tmp_path)
    manifest(model__library="keras")(tmp_path)
    with pytest.raises(tokenprune.CheckpointError, match="no adapter for 'keras' is installed"):
        tokenprune.from_pretrained(tmp_path)


def test_shards_and_dtypes_of_transformers_load_back(tmp_path: Path) -> None:
    case = BY_NAME["transformers ViT classifier"]
    model: Any = case.sparsified(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = tokenprune.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert same_outputs(model, loaded, case, case.images(dtype=torch.bfloat16))


def test_a_damaged_or_dense_folder_of_transformers_is_refused(tmp_path: Path) -> None:
    case = BY_NAME["transformers ViT classifier"]
    dense: Any = case.model()
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(tokenprune.CheckpointError, match="no safetensors file with a sparsified model's tensors"):
        tokenprune.from_pretrained(tmp_path / "dense")
    model: Any = case.sparsified()
    model.save_pretrained(tmp_path / "sparse")
    file = tmp_path / "sparse" / "model.safetensors"
    stored = load_file(file)
    name = next(name for name in stored if not name.startswith("tokenprune."))
    save_file({key: tensor for key, tensor in stored.items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(tokenprune.CheckpointError, match=r"cannot be loaded by the library.*do not fit"):
        tokenprune.from_pretrained(tmp_path / "sparse")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(tokenprune.CheckpointError, match="is damaged or truncated"):
        tokenprune.from_pretrained(tmp_path / "sparse")


# The record in the state dict


def test_a_state_dict_knows_which_stages_it_belongs_to() -> None:
    model = VIT.sparsified()
    state = model.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    assert [key for key in state if not key.startswith("tokenprune.")] == list(VIT.model().state_dict())
    other = tokenprune.sparsify(VIT.model(), (1, 3), 0.6)
    with pytest.raises(RuntimeError, match=r"scorers at stages \(2, 4\), and these are at \(1, 3\)"):
        other.load_state_dict(state)
    ratio = tokenprune.sparsify(VIT.model(), (2, 4), 0.3)
    ratio.load_state_dict(state)
    assert ratio.tokenprune.keep_ratio == (0.3, 0.09), "weights do not change what the user set"
    without = {name: value for name, value in state.items() if not name.endswith("_extra_state")}
    other.load_state_dict(without)  # converted weights have none
    ratio.tokenprune.keep_ratio = (1 / 3, 1 / 7)
    shapes = [each.state_dict()["tokenprune._extra_state"].shape for each in (model, ratio)]
    assert shapes[0] == shapes[1], "averages copy one into the other"
    broken = {**state, "tokenprune._extra_state": torch.zeros(8, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match="is damaged"):
        model.load_state_dict(broken)


# The card and the Hub


def test_the_card_has_the_table_and_how_to_load(tmp_path: Path) -> None:
    model = VIT.sparsified()
    tokenprune.save_pretrained(model, tmp_path)
    text = (tmp_path / "README.md").read_text()
    report = tokenprune.flops(model, (3, 48, 48))
    total = f"| **all** | {report.dense / 1e9:.3f} | {report.sparse / 1e9:.3f} | {report.ratio:.2f} |"
    assert total in text and "tokenprune.from_pretrained(" in text and "library_name: tokenprune" in text
    assert "blocks 0 … 1, 100.0% of the tokens" in text and "blocks 4 … 5, 36.0% of the tokens" in text
    (tmp_path / "README.md").write_text("mine")
    tokenprune.save_pretrained(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


class FakeHub:
    """Repositories in folders."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, list[dict[str, Any]]()

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(options)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> Any:
        self.calls.append(options)
        target = self.root / repo_id
        target.mkdir(parents=True, exist_ok=True)
        for file in Path(folder_path).iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return SimpleNamespace(commit_url=f"commit/of/{repo_id}")

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.calls.append(options)
        return str(self.root / repo_id)


def test_pushed_to_the_hub_and_fetched_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token=None: hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    model = VIT.sparsified()
    assert tokenprune.push_to_hub(model, "me/pruned", private=True, revision="dev") == "commit/of/me/pruned"
    assert hub.calls[0] == {"private": True, "exist_ok": True} and hub.calls[1]["revision"] == "dev"
    assert 'from_pretrained("me/pruned")' in (tmp_path / "me" / "pruned" / "README.md").read_text()
    names = sorted(file.name for file in (tmp_path / "me" / "pruned").iterdir())
    assert names == ["README.md", "tokenprune.json", "tokenprune.safetensors"]
    loaded = tokenprune.from_pretrained("me/pruned", revision="dev", token="t")
    assert hub.calls[-1]["revision"] == "dev" and hub.calls[-1]["token"] == "t" and same_outputs(model, loaded, VIT)
    hub.calls.clear()
    with pytest.raises(tokenprune.StateError):
        tokenprune.push_to_hub(VIT.model(), "me/dense")
    assert not hub.calls, "what cannot be saved makes no repository"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nobody/nothing", "no folder 'nobody/nothing', and no Hub repository"),
        ("nothing", "not the id of a Hub repository"),
        (Path("nobody/nothing"), "not the id of a Hub repository"),
        (Path(__file__), "is a file; give the folder"),
    ],
)
def test_a_source_that_does_not_exist_is_named(source: str | Path, message: str) -> None:
    with pytest.raises(tokenprune.CheckpointError, match=message):
        tokenprune.from_pretrained(source)
