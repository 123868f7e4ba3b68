"""The census: every model that is listed as supported is proved, and every other one is refused.

``make test`` proves one model of each kind of timm's, and all of transformers'; ``make test-all`` proves all, and
prints how many. ``pytest tests/test_census.py --write-supported`` writes what was proved beside the adapters.

An entry that its library cannot run unpruned is skipped, and listed when all is done: tests/census/hosts.py.
"""

from __future__ import annotations

import copy
import json
from importlib.resources import files
from typing import Any

import pytest
import torch

import tokenprune
from tests.census import timm as census_timm
from tests.census import timm_other_files, transformers_refused
from tests.census import torchvision as census_torchvision
from tests.census import transformers as census_transformers
from tests.census.entry import KEEP_RATIO, STAGES, Entry
from tests.census.hosts import assert_most_run, is_older
from tests.census.proof import describe, prove
from tests.helpers.zoo import hook_counts

DISTINCT_TIMM = census_timm.distinct([*census_timm.flat(), *census_timm.volo(), *census_timm.naflex_dict()])
_distinct_names = {entry.name for entry in DISTINCT_TIMM}
ALIKE_TIMM = [
    entry
    for entry in (*census_timm.flat(), *census_timm.volo(), *census_timm.naflex_dict())
    if entry.name not in _distinct_names
]
OTHERS = [
    *census_transformers.supported(),
    *census_transformers.uncovered(),
    *census_transformers.composites(),
    *census_torchvision.supported(),
]
OTHER_FILES_OF_TIMM = timm_other_files.other_files()
REFUSED = transformers_refused.refused() + transformers_refused.refused_composites()


def names(entries: list[Entry]) -> list[str]:
    return [f"{entry}-{index}" for index, entry in enumerate(entries)]


@pytest.mark.parametrize("entry", DISTINCT_TIMM + OTHERS, ids=names(DISTINCT_TIMM + OTHERS))
def test_one_model_of_each_kind(entry: Entry, record_property: Any) -> None:
    record_property(f"supported {entry.library}", prove(entry))


@pytest.mark.slow
@pytest.mark.parametrize("entry", ALIKE_TIMM, ids=names(ALIKE_TIMM))
def test_all_models_alike(entry: Entry, record_property: Any) -> None:
    record_property(f"supported {entry.library}", prove(entry))


def takes_one_image(entry: Entry) -> bool:
    inputs = entry.inputs(1, torch.Generator())
    (value, *others) = inputs.values()
    return not others and isinstance(value, torch.Tensor) and value.dim() == 4 and len(value) == 1


COUNTED = [entry for entry in DISTINCT_TIMM + OTHERS if takes_one_image(entry)]


@pytest.mark.slow
@pytest.mark.parametrize("entry", COUNTED, ids=names(COUNTED))
def test_every_kind_is_counted(entry: Entry) -> None:
    (images,) = entry.example().values()
    model = tokenprune.sparsify(entry.model(), STAGES, KEEP_RATIO)
    report = tokenprune.flops(model, tuple(images.shape[1:]))
    # Fewer tokens in the later half of the blocks, and what counts most is proportional to them.
    assert sum(report.sparse_blocks) < 0.85 * sum(report.dense_blocks)
    assert report.sparse_blocks[-1] <= 0.5 * report.dense_blocks[-1]  # 0 of both where nothing depends on it


def refuse(entry: Entry) -> str:
    model = entry.model()
    with torch.no_grad():
        model(**entry.example())  # some libraries add hooks and buffers of their own now
    before = (
        hook_counts(model),
        [(name, set(vars(module)), module.training) for name, module in model.named_modules()],
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )
    with pytest.raises(tokenprune.UnsupportedModelError) as caught:
        tokenprune.sparsify(model, STAGES)
    assert hook_counts(model) == before[0]
    assert [(name, set(vars(module)), module.training) for name, module in model.named_modules()] == before[1]
    assert all(torch.equal(tensor, before[2][name]) for name, tensor in model.state_dict().items())
    assert type(model).__name__ in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("entry", REFUSED, ids=names(REFUSED))
def test_what_needs_every_token_or_has_no_flat_list_of_blocks_is_refused(entry: Entry, record_property: Any) -> None:
    record_property(f"refused {entry.library}", {"name": entry.name, "reason": refuse(entry)})


@pytest.mark.slow
@pytest.mark.parametrize("entry", OTHER_FILES_OF_TIMM, ids=str)
def test_every_other_file_of_timm_is_refused(entry: Entry, record_property: Any) -> None:
    record_property(f"refused {entry.library}", {"name": entry.name, "reason": refuse(entry)})


COMPILED = DISTINCT_TIMM + census_transformers.supported() + census_torchvision.supported()[:1]


@pytest.mark.slow
@pytest.mark.parametrize("entry", COMPILED, ids=names(COMPILED))
@pytest.mark.parametrize("how", ["compile", "export"])
def test_compiled_and_exported(entry: Entry, how: str, record_property: Any) -> None:
    """Recorded where it works with the unpruned model; where it does, it must work with the pruned one."""
    model, inputs = entry.model(), entry.example()

    def run(model: torch.nn.Module) -> Any:
        with torch.no_grad():
            if how == "export":
                return torch.export.export(model, (), inputs, strict=False).module()(**inputs)
            torch._dynamo.reset()
            return torch.compile(model, backend="eager", fullgraph=True)(**inputs)

    try:
        run(copy.deepcopy(model))
    except Exception as error:
        pytest.skip(f"the unpruned model cannot be {how}ed: {type(error).__name__}")
    tokenprune.sparsify(model, STAGES)
    with torch.no_grad():
        expected = tokenprune.analysis.verification.named_outputs(model(**inputs))
    actual = tokenprune.analysis.verification.named_outputs(run(model))
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-4)
    record_property(f"passes {entry.library}", {**describe(entry, model, inputs), "passes": [how]})


@pytest.mark.parametrize(
    ("library", "entries"),
    [
        ("timm", DISTINCT_TIMM),
        pytest.param("timm", ALIKE_TIMM + OTHER_FILES_OF_TIMM, marks=pytest.mark.slow),
        ("transformers", [entry for entry in OTHERS + REFUSED if entry.library == "transformers"]),
        ("torchvision", [entry for entry in OTHERS if entry.library == "torchvision"]),
    ],
    ids=["timm, one of each kind", "timm, all others", "transformers", "torchvision"],
)
def test_hardly_any_library_s_own_model_fails(library: str, entries: list[Entry]) -> None:
    assert_most_run(library, entries)


@pytest.mark.parametrize("library", ["timm", "transformers", "torchvision"])
def test_nothing_is_listed_as_supported_that_is_not_tested(library: str) -> None:
    tested = {(entry.library, entry.name) for entry in (*DISTINCT_TIMM, *ALIKE_TIMM, *OTHERS)}
    listed = tokenprune.supported(library)
    assert listed
    assert is_older(library) or {(model.library, model.name) for model in listed} <= tested
    assert all(model.passes[:3] == ("identity", "mask = gather", "undo") for model in listed)
    data = json.loads((files(f"tokenprune_{library}") / "supported.json").read_text(encoding="utf-8"))
    assert len(data["models"]) == len(listed)
