"""What must hold for a model that is listed as supported, and what it says of itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import tokenprune
from tests.census.entry import KEEP_RATIO, STAGES, Entry
from tests.helpers.tolerances import CENSUS_IDENTITY, CENSUS_MASK_EQUALS_GATHER
from tests.helpers.zoo import hook_counts
from tokenprune.analysis.verification import named_outputs


def prove(entry: Entry) -> dict[str, Any]:
    """Prove the invariants on a model, and say what it is: the fields of a `tokenprune.SupportedModel`."""
    model, inputs = entry.model(), entry.example()
    with torch.no_grad():
        before = named_outputs(model(**inputs))  # first of all, since some libraries build their tables now
        keys, hooks = list(model.state_dict()), hook_counts(model)

    tokenprune.sparsify(model, STAGES, KEEP_RATIO)
    report = tokenprune.verify(model, inputs, tolerance=CENSUS_MASK_EQUALS_GATHER)
    assert report.passed, str(report)
    assert report.identity <= CENSUS_IDENTITY and report.effect > 1e-4, str(report)
    # A vision tower inside of a language model is trained by itself.
    assert len(report.gradients) == (0 if model.tokenprune.backbone.leave_pruned else len(STAGES))

    fields = describe(entry, model, inputs)
    tokenprune.unsparsify(model)
    assert list(model.state_dict()) == keys and hook_counts(model) == hooks
    with torch.no_grad():
        after = named_outputs(model(**inputs))
    assert all(torch.equal(after[name], before[name]) for name in before)
    return fields


def describe(entry: Entry, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """What a sparsified model is: the fields of a `tokenprune.SupportedModel`, told from what it does."""
    sparsifier = model.tokenprune
    side_inputs: set[str] = set()
    cutting = sparsifier._pruning.side_inputs
    shorten = cutting._shorten

    def noted(value: Any, name: str, *rest: Any) -> Any:
        shortened = shorten(value, name, *rest)
        if isinstance(value, Tensor) and shortened is not value and name:
            side_inputs.add(name)
        return shortened

    cutting._shorten = noted
    with torch.no_grad():
        model(**inputs)
        assert [kept.shape[1] for kept in sparsifier.trace.indices] == [*sparsifier.plan.num_keep(
            sparsifier.trace.num_patches
        )]  # fmt: skip
        pools: list[str] = []
        tail = sparsifier._tail
        for name in ("reduce", "without_pruned", "attention", "softmax"):
            setattr(tail, name, _noting(pools, name, getattr(tail, name)))
        sparsifier.execution = "mask"
        model(**inputs)
        sparsifier.execution = "auto"
    trained = ["training step"] if not sparsifier.backbone.leave_pruned else []
    return {
        "family": entry.family,
        "name": entry.name,
        "model_class": type(model).__name__,
        "pooling": _pooling(model, pools),
        "position_encoding": _position_encoding(model),
        "side_inputs": sorted(side_inputs | ({"bias"} if sparsifier.backbone.biased_attention else set())),
        "passes": ["identity", "mask = gather", "undo", *trained],
    }


def _noting(pools: list[str], name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        if isinstance(result, Tensor) or (name == "without_pruned" and result is not args):
            pools.append(name)
        return result

    return noted


def _pooling(model: nn.Module, pools: list[str]) -> str:
    """How tokens become an output: what was seen of it, and otherwise what takes single tokens."""
    if model.tokenprune.backbone.put_back:
        return "all tokens, put back"
    names = {"reduce": "mean or maximum", "without_pruned": "maximum", "attention": "attention", "softmax": "attention"}
    seen = [text for name, text in names.items() if name in pools]
    if seen:
        return " and ".join(dict.fromkeys(seen))
    backbone = model.tokenprune.backbone
    return "class token" if backbone.num_prefix_tokens + backbone.num_late_prefix_tokens else "tokens as they are"


def _position_encoding(model: nn.Module) -> str:
    """What the names of modules, parameters and buffers say of positions."""
    names = [type(module).__name__ for module in model.modules()]
    names += [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    text = " ".join(names).lower()
    kinds = {
        "rotary": r"rope|rotary|inv_freq|freqs_ci",
        "relative bias": r"rel_pos|relpos|relative_position|rel_indices",
        "learned": r"pos_embed|position_embed|pos_emb|positional_embed|pos_encode",
    }
    found = [kind for kind, pattern in kinds.items() if re.search(pattern, text)]
    return " and ".join(found) or "none"
