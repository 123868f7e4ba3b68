"""Folders as recipes leave them behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EVIL = '<script>alert("1")</script><img src="http://example.com/x.png" onerror=alert(1)> & "q" \'s\''


def write_run(folder: Path, *, sparse: bool = True, name: str = EVIL, top1: float = 0.75, gmacs: float = 0.6) -> Path:
    """What a recipe leaves behind."""
    folder.mkdir(parents=True)
    results: dict[str, Any] = {
        "settings": {"model": name, "epochs": 3, "data_dir": "images", "keep_ratio": [0.6]},
        "scores": {"top1": top1, "top5": 0.9},
        "gmacs": {"dense": 1.0},
        "versions": {"tokenprune": "0.1.0", "timm": "1.0.31"},
        "command": f"python -m recipes.deit --model {name}",
    }
    lines: list[dict[str, Any]] = [{"kind": "evaluation", "step": step, "top1": step / 40} for step in (10, 20, 30)]
    if sparse:
        results["scores"] |= {"kept_1": 0.6, "dense_top1": 0.8, "dense_top5": 0.95}
        results["gmacs"]["sparse"] = gmacs
        lines += [{"kind": "training", "step": step, "kept_1": 0.9 - step / 100, "kept_2": 0.5, "loss": float("nan")}
                  for step in range(1, 31)]  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    log = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(log + '{"kind": "training", "st')  # torn, as by a kill
    return folder
