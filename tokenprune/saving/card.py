"""The model card: what a saved folder's README.md says to people and to the Hub."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path

from torch import nn

from tokenprune.analysis.flop_counter import FlopReport, flops
from tokenprune.api import sparsifier_of
from tokenprune.saving.manifest import Manifest

FILE = "README.md"
SOURCE = "<this folder or repository>"
"""Placeholder in a card for where the model is, which a folder does not know."""
_MARK = "<!-- written by tokenprune.save_pretrained; take this line out to keep your own text -->"
_logger = logging.getLogger(__name__)


def may_write(folder: Path) -> bool:
    """Whether a folder has no card, or one that tokenprune wrote."""
    file = folder / FILE
    return not file.exists() or _MARK in file.read_text(encoding="utf-8", errors="replace")


def card(model: nn.Module, manifest: Manifest) -> str:
    """The card of a sparsified model, with the multiply-adds counted on the spot."""
    from huggingface_hub import ModelCard, ModelCardData

    identity = manifest.identity or {}
    data = ModelCardData(
        library_name="tokenprune",
        tags=["token-pruning", "vision-transformer", *([manifest.library] if manifest.library else [])],
        base_model=identity.get("hub_id"),
    )
    name = manifest.model_class.rpartition(".")[2]
    plan = manifest.record.plan
    kept = ", ".join(f"{ratio:.1%}" for ratio in plan.keep_ratios)
    before = ", ".join(map(str, plan.stages))
    what = "The scorers alone of a" if manifest.scorers_only else "A"
    parts = [
        f"---\n{data.to_yaml()}\n---\n{_MARK}\n",
        f"# {name}, sparsified\n",
        f"{what} {name} that drops the image tokens it does not need, in the way of "
        "[DynamicViT](https://arxiv.org/abs/2106.02034), made with tokenprune. At blocks "
        f"{before} the scorer ({manifest.record.scorer or 'one of its own'}) chooses the tokens that go on: {kept} of "
        "the original ones.\n",
        "## Use\n",
        f"```python\nimport tokenprune\n\nmodel = tokenprune.from_pretrained({_call(manifest)})\n```\n",
        "`model` is of the class of the dense model; `tokenprune.unsparsify(model)` takes out what was added to it.\n",
        "## Multiply-adds of one image\n",
        _table(model),
    ]
    return str(ModelCard("\n".join(parts)))


def _call(manifest: Manifest) -> str:
    arguments = [f'"{SOURCE}"']
    arguments += ["model=dense_model"] if manifest.identity is None else []
    arguments += ["scorer=build_scorer"] if manifest.record.scorer is None else []
    arguments += ["pruned=build_reduction"] if manifest.record.pruned is None else []
    return ", ".join(arguments)


def _table(model: nn.Module) -> str:
    size = sparsifier_of(model).backbone.input_size(model)
    try:
        report = flops(model, size)
    except Exception as error:  # weights are saved even where the table cannot be made
        _logger.warning("the model card goes without a table of multiply-adds: %s", error)
        return f"Not counted: the model does not run on one image of {' × '.join(map(str, size))} alone.\n"
    return _markdown(report)


def _markdown(report: FlopReport) -> str:
    def row(name: str, before: int, after: int) -> str:
        ratio = f"{before / after:.2f}" if after else ""
        return f"| {name} | {before / 1e9:.3f} | {after / 1e9:.3f} | {ratio} |"

    bounds = [0, *report.stage_blocks, len(report.dense_blocks)]
    rows = []
    for index, (start, stop) in enumerate(pairwise(bounds)):
        if start == stop:
            continue
        kept = report.keep_ratios[index - 1] if index else 1.0
        name = f"blocks {start} … {stop - 1}" if stop - start > 1 else f"block {start}"
        rows.append(row(f"{name}, {kept:.1%} of the tokens", sum(report.dense_blocks[start:stop]),
                        sum(report.sparse_blocks[start:stop])))  # fmt: skip
    scorers = sum(report.stages)
    rows.append(f"| scorers | | {scorers / 1e9:.3f} | |")
    rest = report.dense - sum(report.dense_blocks), report.sparse - sum(report.sparse_blocks) - scorers
    rows += [row("everything else", *rest), row("**all**", report.dense, report.sparse)]
    size = " × ".join(map(str, report.input_size))
    head = ["| part | dense, GMACs | sparse, GMACs | dense ÷ sparse |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, "", f"For an image of {size}; counted by `tokenprune.flops`.", ""])
