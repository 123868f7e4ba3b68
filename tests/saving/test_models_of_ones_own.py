"""Saving models that nobody can build, and scorers without a name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenprune
from tests.helpers.saved import IMAGES, VIT, Mine, describe, own, same_outputs, save
from tokenprune.scorers import base as scorers


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
    with pytest.raises(tokenprune.CheckpointError, match="not what scorer='predictor' and pruned='drop' build"):
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
