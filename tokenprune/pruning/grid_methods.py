"""Methods of a model that need the full grid of tokens, guarded while some are missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from tokenprune.errors import StateError

if TYPE_CHECKING:
    from tokenprune.pruning.sparsifier import Sparsifier


class GridMethod:
    """Stands in for a method of the model that reshapes tokens into a grid, and refuses while some are missing."""

    def __init__(self, sparsifier: Sparsifier, model: nn.Module, name: str) -> None:
        self.sparsifier, self.model, self.name = sparsifier, model, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.sparsifier.enabled and any(ratio < 1 for ratio in self.sparsifier.keep_ratio):
            raise StateError(
                f"{type(self.model).__name__}.{self.name} needs the full grid of tokens, and this model drops some. "
                'Sparsify it with pruned="preserve", or call the method inside tokenprune.dense(model).'
            )
        return getattr(type(self.model), self.name)(self.model, *args, **kwargs)
