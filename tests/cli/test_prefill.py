"""``tokenprune prefill``: what it counts and measures, on every kind of prompt, and how it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.helpers.command_line import fields, run
from tests.helpers.vision_language import CASES
from tests.helpers.zoo import BY_NAME

pytestmark = pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5, reason="prompts are shortened from transformers 5 on"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for case in CASES:
        model: Any = case.model()
        model.save_pretrained(root / case.label)
    vit: Any = BY_NAME["transformers ViT classifier"].model()
    vit.save_pretrained(root / "vit")
    return root


FAST = ("llava_next", "qwen3_vl")
FAMILIES = [pytest.param(case.label, marks=() if case.label in FAST else pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_model_has_its_prompts(folder: Path, family: str) -> None:
    options = ("--pairs", "2", "--warmup", "0", "--device", "cpu", "-b", "2", "--words", "6", "-k", "0.5", "-k", "0.25")
    half, quarter = fields("prefill", str(folder / family), *options)["reports"]
    before, after = half["image_tokens"]
    assert before // 2 - 2 <= after <= before // 2 and half["num_prompts"] == 2 and half["pruner"] == "diverse"
    assert half["prompt_tokens"][0] == before // 2 + 6 and quarter["image_tokens"][1] < after
    assert half["sparse"]["language model"] < half["dense"]["language model"]
    assert len(half["random_seconds"]) == 2


def test_a_table_for_people_has_the_random_baseline(folder: Path) -> None:
    options = ("--pairs", "2", "--warmup", "0", "--device", "cpu", "--stages", "1,2", "--keep-ratio", "0.7,0.5")
    told = run("prefill", str(folder / "internvl"), *options)
    assert told.exit_code == 0
    for part in ("tower", "projector", "language model", "cache", "random", "image tokens"):
        assert part in told.output


def test_what_is_wrong_with_it_is_one_line(folder: Path) -> None:
    for arguments, told in (
        ((str(folder / "vit"),), "is no vision-language model"),
        ((str(folder / "llava"), "--pruner", "divers"), "choose from"),
        ((str(folder / "llava"), "-k", "0.7,0.5"), "do not match"),
    ):
        result = run("prefill", *arguments, "--device", "cpu")
        assert result.exit_code == 2 and told in result.stderr.splitlines()[-1]
