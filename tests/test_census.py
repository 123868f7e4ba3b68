"""The census: every model that is listed as supported is proved, and every other one is refused.

``make test`` proves one model of each kind of timm's, and all of transformers' but some that differ only behind their
tower; ``make test-all`` proves all, compiles and exports those of each kind, and prints how many. The lists beside the
adapters are written by ``tokenprune prove``: CONTRIBUTING.md says how.

An entry that its library cannot run unpruned is skipped, and listed when all is done: tests/census/hosts.py.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
import torch
from packaging.version import Version

import tokenprune
from tests.census import timm as census_timm
from tests.census import (
    timm_hierarchies,
    timm_other_files,
    torchvision_hierarchies,
    transformers_hierarchies,
    transformers_packed,
    transformers_refused,
)
from tests.census import torchvision as census_torchvision
from tests.census import transformers as census_transformers
from tests.census.entry import KEEP_RATIO, STAGES, Entry
from tests.census.hosts import assert_most_run, is_older, recorded_release
from tests.helpers.zoo import hook_counts

TIMM = census_timm.flat_examples()
DISTINCT_TIMM = [entry for entry in TIMM if entry.compiled]
ALIKE_TIMM = [entry for entry in TIMM if not entry.compiled]
ALIKE = [*ALIKE_TIMM, *transformers_packed.alike()]
OTHERS = [*census_transformers.flat_examples(), *census_torchvision.flat_examples()]
OTHER_FILES_OF_TIMM = timm_other_files.other_files()
REFUSED = transformers_refused.refused() + transformers_refused.refused_composites()


def names(entries: list[Entry]) -> list[str]:
    return [f"{entry}-{index}" for index, entry in enumerate(entries)]


def prove(entry: Entry, *, compiled: bool) -> tokenprune.SupportedModel:
    """Prove an entry, and compare it with what the list beside the adapter says, on the release that wrote the list."""
    proved = tokenprune.prove(entry, library=entry.library, compiled=compiled)
    if Version(version(entry.library)) == recorded_release(entry.library):
        (listed,) = [
            model
            for model in tokenprune.supported(entry.library)
            if (model.family, model.name) == (entry.family, entry.name)
        ]
        for field in ("model_class", "pooling", "position_encoding"):
            assert getattr(proved, field) == getattr(listed, field), "run tokenprune prove, see CONTRIBUTING.md"
        # Of a class that stands in the tables more than once, all that it was given is listed.
        assert {*proved.side_inputs} <= {*listed.side_inputs} and {*proved.passes} <= {*listed.passes}
    return proved


@pytest.mark.parametrize("entry", DISTINCT_TIMM + OTHERS, ids=names(DISTINCT_TIMM + OTHERS))
def test_one_model_of_each_kind(entry: Entry, record_property: Any) -> None:
    prove(entry, compiled=False)
    record_property(f"supported {entry.library}", entry.name)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ALIKE, ids=names(ALIKE))
def test_all_models_alike(entry: Entry, record_property: Any) -> None:
    prove(entry, compiled=False)
    record_property(f"supported {entry.library}", entry.name)


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


def refuse(entry: Entry) -> None:
    model = entry.model()
    with torch.no_grad():
        model(**entry.example())  # some libraries add hooks and buffers of their own now
    before = (
        hook_counts(model),
        [(name, set(vars(module)), module.training) for name, module in model.named_modules()],
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )
    with pytest.raises(tokenprune.UnsupportedModelError) as caught:
        # Stages of its own choice: those of the census need not stand in one level of a hierarchy.
        tokenprune.sparsify(model)
    assert hook_counts(model) == before[0]
    assert [(name, set(vars(module)), module.training) for name, module in model.named_modules()] == before[1]
    assert all(torch.equal(tensor, before[2][name]) for name, tensor in model.state_dict().items())
    assert type(model).__name__ in str(caught.value)


@pytest.mark.parametrize("entry", REFUSED, ids=names(REFUSED))
def test_what_needs_every_token_or_has_no_flat_list_of_blocks_is_refused(entry: Entry, record_property: Any) -> None:
    refuse(entry)
    record_property(f"refused {entry.library}", entry.name)


@pytest.mark.slow
@pytest.mark.parametrize("entry", OTHER_FILES_OF_TIMM, ids=str)
def test_every_other_file_of_timm_is_refused(entry: Entry, record_property: Any) -> None:
    refuse(entry)
    record_property(f"refused {entry.library}", entry.name)


COMPILED = [entry for entry in DISTINCT_TIMM + OTHERS if entry.compiled]


@pytest.mark.slow
@pytest.mark.parametrize("entry", COMPILED, ids=names(COMPILED))
def test_compiled_and_exported(entry: Entry) -> None:
    """Where it works with the unpruned model, it must work with the pruned one."""
    proved = prove(entry, compiled=True)
    if not {"compile", "export"} & {*proved.passes}:
        pytest.skip("the unpruned model can neither be compiled nor be exported")


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


def test_every_tower_that_packs_images_is_listed() -> None:
    """Before packed sequences could be pruned, all of them were refused, but for Pixtral's, pruned as one image."""
    listed = {(model.family, model.name) for model in tokenprune.supported("transformers")}
    packing = {(entry.family, entry.name) for entry in transformers_packed.towers()}
    assert packing <= listed
    if not is_older("transformers"):
        assert len(packing - {("pixtral", "PixtralVisionModel")}) >= 30


@pytest.mark.parametrize("library", ["timm", "transformers", "torchvision"])
def test_nothing_is_listed_as_supported_that_is_not_tested(library: str) -> None:
    hierarchies = (
        *timm_hierarchies.examples(), *transformers_hierarchies.examples(), *torchvision_hierarchies.every()
    )  # fmt: skip
    tested = {(entry.library, entry.name) for entry in (*DISTINCT_TIMM, *ALIKE, *OTHERS, *hierarchies)}
    listed = tokenprune.supported(library)
    assert listed
    assert is_older(library) or {(model.library, model.name) for model in listed} <= tested
    assert all(model.passes[:3] == ("identity", "mask = gather", "undo") for model in listed)
    assert len({(model.family, model.name) for model in listed}) == len(listed)
