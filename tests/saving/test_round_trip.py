"""Saving and loading: what comes back is what went in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tokenprune
from tests.helpers.saved import IMAGES, SMALL, VIT, Mine, describe, own, same_outputs, save
from tests.helpers.zoo import BY_NAME, Case, hook_counts, some_models


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


@pytest.mark.parametrize("scorer", ["predictor", "predictor_slim", "predictor_linear", "static", "random"])
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
