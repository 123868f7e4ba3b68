"""The names under which a `transformers.Trainer` saves weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


@contextmanager
def own_names(model: nn.Module) -> Iterator[None]:
    """While it lasts, ``model.save_pretrained`` writes weights under the names of the model's ``state_dict``.

    From version 5 on, transformers writes them under the names of the checkpoints that were published
    first, which the Trainer cannot load again (transformers issue 48805).
    ``from_pretrained`` reads both.
    """
    save: Any = getattr(model, "save_pretrained", None)
    if save is None or "save_original_format" not in inspect.signature(save).parameters:
        yield
        return
    model.__dict__["save_pretrained"] = partial(save, save_original_format=False)
    try:
        yield
    finally:
        del model.__dict__["save_pretrained"]
