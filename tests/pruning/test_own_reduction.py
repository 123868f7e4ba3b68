"""A reduction in one file: the library does with pruned tokens what it does not know of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import tokenprune
from tests.helpers.tolerances import MASK_EQUALS_GATHER
from tests.helpers.zoo import BY_NAME, Case
from tokenprune import Split

TOLERANCE = MASK_EQUALS_GATHER[torch.float32]
some_models = pytest.mark.parametrize("case", [BY_NAME[name] for name in (
    "timm class token", "timm no class token, average", "timm LV-ViT", "transformers ViT classifier", "torchvision"
)], ids=str)  # fmt: skip


class Mean(tokenprune.Reduction):
    """Adds to every kept token the mean of those that were pruned, weighted with a learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, split: Split) -> tokenprune.Reduced:
        weights = split.pruned / split.pruned.sum(dim=1, keepdim=True).clamp(min=1)
        mean = (weights.to(split.patches.dtype).unsqueeze(-1) * split.patches).sum(dim=1, keepdim=True)
        return tokenprune.Reduced(split.patches + self.factor * mean)


@pytest.fixture
def mean_registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from tokenprune.pruning.reductions import base

    monkeypatch.setattr(base, "_BUILDERS", dict(base._BUILDERS))
    tokenprune.register_reduction("mean")(lambda context: Mean())
    yield


@some_models
@pytest.mark.usefixtures("mean_registered")
def test_a_reduction_of_ones_own(case: Case, tmp_path: Path) -> None:
    model, images = case.sparsified(pruned="mean"), case.images()
    report = tokenprune.verify(model, images, tolerance=TOLERANCE)
    assert report.passed, str(report)
    with torch.no_grad():
        expected = case.run(model, images)
        tokenprune.save_pretrained(model, tmp_path, model_card=False)
        loaded = tokenprune.from_pretrained(tmp_path, model=case.model())
        assert all(torch.equal(output, expected[name]) for name, output in case.run(loaded, images).items())
    assert {name for name, _ in model.tokenprune.named_parameters() if "reduction" in name} == {
        "stages.0.reduction.factor", "stages.1.reduction.factor"
    }  # fmt: skip


def test_a_reduction_without_a_name_is_passed_again(tmp_path: Path) -> None:
    case = BY_NAME["torchvision"]
    model = case.sparsified(pruned=lambda context: Mean())
    with pytest.warns(UserWarning, match="will need pruned=builder"):
        tokenprune.save_pretrained(model, tmp_path, model_card=False)
    with pytest.raises(tokenprune.CheckpointError, match="pass pruned=, the callable"):
        tokenprune.from_pretrained(tmp_path)
    with torch.no_grad():
        loaded = tokenprune.from_pretrained(tmp_path, pruned=lambda context: Mean())
        assert torch.equal(loaded(case.images()), model(case.images()))
