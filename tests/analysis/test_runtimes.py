"""Runtimes: each runs the models that it is given, and the model that is measured does not notice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import tokenprune
from tests.helpers.zoo import BY_NAME, hook_counts
from tokenprune.analysis import benchmark, runtimes
from tokenprune.analysis.runtimes import Timers, in_turn, runtime_named, timers_of
from tokenprune.saving import onnx_process
from tokenprune.saving import runtimes as of_files

SIZE = (3, 48, 48)
case = BY_NAME["timm registers, average with prefix"]  # 3 prefix tokens, 36 patch tokens, of which 12 are left


def test_who_begins_changes_from_round_to_round() -> None:
    runs: list[str] = []
    clock = {"dense": 3.0, "sparse": 1.0, "cut": 0.5}

    def timer(name: str) -> Callable[[], float]:
        return lambda: runs.append(name) or clock[name]  # type: ignore[func-returns-value]

    steps: list[tuple[int, int]] = []
    names = list(clock)
    times = in_turn([timer(name) for name in names], rounds=2, warmup=1, progress=lambda *done: steps.append(done))
    assert runs == ["cut", "dense", "sparse", "dense", "sparse", "cut", "sparse", "cut", "dense"] and steps == [
        (1, 3),
        (2, 3),
        (3, 3),
    ]
    assert times == [(3.0, 3.0), (1.0, 1.0), (0.5, 0.5)]


@pytest.mark.parametrize("frozen", [False, True])
def test_dense_sparse_and_cut_models_are_what_runs(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = case.sparsified()
    if frozen:
        tokenprune.freeze(model)
    model.train()
    hooks, before = hook_counts(model), copy.deepcopy(model.state_dict())
    given: list[Sequence[nn.Module]] = []

    @contextmanager
    def seen(models: Sequence[nn.Module], input_size: Sequence[int]) -> Iterator[Timers]:
        given.append(models)
        assert input_size == SIZE
        yield partial(timers_of, models)

    monkeypatch.setitem(runtimes._RUNTIMES, "seen", seen)
    reports = benchmark.throughputs(model, SIZE, batch_sizes=[1, 3], pairs=2, warmup=0, limit=True, runtime="seen")
    assert [report.batch_size for report in reports] == [1, 3] and str(reports[0]).endswith("batch 1, runtime seen")
    assert all(report.runtime == "seen" and report.limit is not None for report in reports)
    assert model.training and hook_counts(model) == hooks and model.tokenprune.frozen is frozen
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "extra" not in name)
    ((dense, sparse, cut),) = given
    images, lengths = case.images(2), []
    for each in (dense, sparse, cut):
        handle = each.blocks[-1].register_forward_hook(lambda block, args, output: lengths.append(output.shape[1]))
        with torch.no_grad():
            each(images)
        handle.remove()
    assert lengths == [39, 15, 15]
    assert sparse.blocks[0].attn.qkv.weight is model.blocks[0].attn.qkv.weight
    assert sparse.tokenprune.frozen is frozen and not hasattr(dense, "tokenprune")
    model.eval()
    with torch.no_grad():
        assert torch.equal(sparse(images), model(images)) and not torch.equal(cut(images), model(images))
        with tokenprune.dense(model):
            assert torch.equal(dense(images), model(images))
    without = benchmark.throughputs(case.sparsified(pruned="preserve"), SIZE, batch_sizes=[1], pairs=2, limit=True,
                                    runtime="seen")  # fmt: skip
    assert without[0].limit is None and len(given[1]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["compile", "pt2", "onnx"])
def test_every_runtime_times_a_frozen_model(runtime: str) -> None:
    model = tokenprune.freeze(case.sparsified())
    for report in benchmark.throughputs(model, SIZE, batch_sizes=[1, 2], pairs=2, limit=True, runtime=runtime):
        assert report.speedup > 0 and report.limit is not None and report.limit > 0


def test_as_many_models_are_compiled_as_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than torch.compile makes of one function, each whole, and with a code of its own."""

    class Times(nn.Module):
        def __init__(self, factor: int) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, images: Tensor) -> Tensor:
            return images * self.factor

    calls: list[Callable[[Tensor], Any]] = []
    monkeypatch.setattr(runtimes, "timers_of", lambda runners, images: calls.extend(runners) or [])
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile_with(*args, backend="eager", **options))
    with torch.no_grad(), runtime_named("compile")([Times(factor) for factor in range(10)], SIZE) as timers:
        timers(images := case.images(1))
        assert all(torch.equal(call(images), images * factor) for factor, call in enumerate(calls)) and len(calls) == 10


def test_onnx_files_run_as_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Session:
        def __init__(self, file: str, options: Any, providers: list[str]) -> None:
            asked.append((file, options.intra_op_num_threads, options.inter_op_num_threads, providers))
            self.file = file

        def get_inputs(self) -> list[Any]:
            return [type("Input", (), {"name": "x"})]

        def run(self, names: None, given: dict[str, Any]) -> None:
            asked.append((self.file, given["x"].shape))

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    np.save(tmp_path / "images.npy", case.images(2).numpy())
    said: list[str] = []
    onnx_process.main(5, ["a", "b"], [f"images {tmp_path / 'images.npy'}\n", "run 1\n", "run 0\n"], said.append)
    provider = ["CPUExecutionProvider"]
    assert asked == [("a", 5, 1, provider), ("b", 5, 1, provider), ("b", (2, *SIZE)), ("a", (2, *SIZE))]
    assert len(said) == 3 and all(float(seconds) >= 0 for seconds in said)


def test_a_process_that_dies_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(of_files, "export", lambda model, file, **options: file.write_text("no model"))
    with (
        pytest.raises(tokenprune.ExportError, match=r"ONNX Runtime has died \(exit code 1\): .*Protobuf"),
        runtime_named("onnx")([case.model()], SIZE) as timers,
    ):
        timers(case.images(1))


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = case.sparsified()
    with pytest.raises(ValueError, match=r"runtime='tensorrt': choose from 'eager', 'compile', '.*'"):
        tokenprune.throughput(model, SIZE, runtime="tensorrt")
    monkeypatch.setattr("tokenprune.saving.export.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'tokenprune\[export\]'"):
        tokenprune.throughput(model, SIZE, runtime="onnx")
    monkeypatch.undo()
    with (
        pytest.raises(tokenprune.UnsupportedModelError, match=r"on a CPU, and the model is on meta; move it"),
        runtime_named("onnx")([nn.Linear(1, 1, device="meta")], SIZE),
    ):
        pass


def test_a_model_that_cannot_be_compiled_whole_is_refused() -> None:
    class Printing(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return images + 1

    with (
        pytest.raises(tokenprune.UnsupportedModelError, match="this Printing cannot be compiled whole: Unsupported: "),
        runtime_named("compile")([Printing()], SIZE) as timers,
    ):
        timers(case.images(1))
