"""What a refusal owes the model: that nothing of it has changed."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import tokenprune
from tests.helpers.zoo import hook_counts


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """All that sparsifying could have left behind."""
    return (
        hook_counts(model),
        [(name, set(vars(module)), module.training) for name, module in model.named_modules()],
        list(model.state_dict()),
        [getattr(module, "fused_attn", None) for module in model.modules()],
        getattr(getattr(model, "config", None), "_attn_implementation", None),
    )


def refused(model: nn.Module, error: type[Exception], match: str, **options: Any) -> str:
    before = fingerprint(model)
    with pytest.raises(error, match=match) as caught:
        tokenprune.sparsify(model, **options)
    assert fingerprint(model) == before
    return str(caught.value)
