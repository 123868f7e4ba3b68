"""`benchmarks.gpu`: that it works the day a GPU is at hand, and stops in time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu, measuring
from benchmarks.gpu import Job, Setup, jobs, work


def test_what_would_not_end_in_time_is_left_out() -> None:
    now = 0.0

    def passing(seconds: float, name: str) -> Job:
        def run() -> tuple[list[list[str]], list[str]]:
            nonlocal now
            now += seconds
            return [[name]], [name]

        return Job(name=name, kind=name[0], seconds=10, run=run)

    def breaking() -> tuple[list[list[str]], list[str]]:
        raise RuntimeError("out of memory\nand more")

    written: list[int] = []
    every = [
        passing(30, "a1"),  # takes three times as long as thought, so the next of its kind is expected to
        passing(10, "b1"),
        Job(name="c1", kind="c", seconds=10, run=breaking),
        passing(30, "a2"),
        passing(10, "b2"),
        passing(10, "b3"),
    ]
    results = work(every, 60.0, lambda results: written.append(len(results.rows)), lambda text: None, lambda: now)
    assert results.data == ["a1", "b1", "b2", "b3"] and now == 60 and written == [1, 2, 2, 3, 4]
    assert results.left_out == ["a2"] and results.failed == ["c1 (RuntimeError: out of memory)"]
    assert results.notes[0] == "Left out for want of time: a2." and "c1" in results.notes[1]


def test_all_that_is_asked_for_is_among_the_work() -> None:
    every = [job.name for job in jobs(Setup(device="cpu", rounds=4, small=False))]
    assert len(set(every)) == len(every)
    for model in ("deit_small_patch16_224", "deit_base_patch16_224", "lvvit_s"):
        for dtype in ("float32", "float16", "bfloat16"):
            for batch in (1, 256):
                start = f"inference of {model}, {dtype}"
                assert f"{start}, eager, batch {batch}, ρ 0.7, 0.5, 0.9, 0.8" in every
                compiled = [name for name in every if name.startswith(f"{start}, compiled, batch {batch}, ")]
                assert sorted(name.partition("ρ ")[2] for name in compiled) == ["0.5, 0.9, 0.8", "0.7"]
    assert sum("masked attention" in name for name in every) == 3
    on_gpu = [job.name for job in jobs(Setup(device="cuda", rounds=4, small=False))]
    assert sum("masked attention" in name and "without our kernels" in name for name in on_gpu) == 3
    assert sum("attention by sizes" in name for name in on_gpu) == 2
    assert sum("training step" in name and "eager" in name for name in every) == 3
    for run in ("eager", "compiled"):
        assert {f"peers of deit_small_patch16_224, bfloat16, {run}, batch {batch}" for batch in (1, 256)} <= {*every}
    assert sum("training step" in name and "compiled" in name for name in every) == 3


def test_what_only_a_gpu_gets_can_be_measured() -> None:
    every = [job for job in jobs(Setup(device="cuda", rounds=4, small=True)) if job.kind == "attention"]
    here = Setup(device="cpu", rounds=4, small=True)
    for job in (gpu._attention(here, "float32", kernels=False), gpu._sizes(here, "bfloat16")):
        rows, data = job.run()
        assert job.name in [other.name for other in every]
        assert len(rows) == len(data) == 1 and len(rows[0]) == len(gpu.COLUMNS)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_small_run(compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "RESULTS", tmp_path)
    few = {}  # one of each kind; compiled ones, which take long, at one batch size and number of ratios
    for each in jobs(Setup(device="cpu", rounds=4, small=True)):
        kind, _, about = each.kind.partition(" inference, ")
        key = f"{kind}, {about.split(', ')[1]}" if kind == "compiled" else each.kind
        if "lvvit" in each.name or "inference" not in each.name:
            few.setdefault(key, each)
    monkeypatch.setattr(gpu, "jobs", lambda setup: list(few.values()))
    gpu.main(minutes=60, device="cpu", rounds=4, compiled=compiled, small=True, name="tried")
    written = json.loads((tmp_path / "tried.json").read_text())["data"]
    assert not written["left_out"] and not written["failed"]
    measured = {(row["what"], row.get("compiled"), row["dtype"]) for row in written["rows"]}
    runs = (False, True) if compiled else (False,)
    assert {("inference", run, dtype) for run in runs for dtype in gpu.DTYPES} <= measured
    assert {("attention", None), ("training step", False), ("peers", False)} <= {row[:2] for row in measured}
    for row in written["rows"]:
        if row["what"] == "inference":
            seconds = row["dense_over_sparse"]
            assert row["gmac_ratio"] > 1 and len(seconds["first_seconds"]) == len(seconds["second_seconds"]) == 4
            assert row["speedup_over_gmac_ratio"] == pytest.approx(row["speedup"] / row["gmac_ratio"])
    table = (tmp_path / "tried.md").read_text()
    assert table.count("\n| ") == 1 + len(written["rows"]) and "Nothing was left out." in table
