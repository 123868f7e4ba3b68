"""The exceptions that tokenprune raises, and where a missing optional dependency becomes one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class TokenpruneError(Exception):
    """Base of every exception that tokenprune raises on purpose."""


class PlanError(TokenpruneError, ValueError):
    """Stages or keep ratios do not make a plan."""


class UnsupportedModelError(TokenpruneError, TypeError):
    """The model cannot be sparsified, or not in the way that was asked for."""


class StateError(TokenpruneError, RuntimeError):
    """The call does not fit the state the model is in, such as sparsifying it twice."""


class PromptError(TokenpruneError, ValueError):
    """A prompt has places for another number of image tokens than its images give."""


class InterceptionError(TokenpruneError, RuntimeError):
    """A masked forward pass reached code whose attention could not be masked."""


class HostError(TokenpruneError, RuntimeError):
    """A library cannot run its own model, dense and untouched, so that nothing can be proved on it."""


class ProofError(TokenpruneError, AssertionError):
    """What must hold for a pruned model does not hold for this one."""


class CheckpointError(TokenpruneError, ValueError):
    """A checkpoint cannot be read, or is not of the model that is wanted.

    Attributes:
        missing: Keys that should be in it and are not.
        unexpected: Keys that are in it and should not be.
    """

    def __init__(self, message: str, *, missing: Iterable[str] = (), unexpected: Iterable[str] = ()) -> None:
        self.missing, self.unexpected = tuple(missing), tuple(unexpected)
        lists = (("missing", self.missing), ("unexpected", self.unexpected))
        super().__init__("\n".join([message, *(f"  {name} keys: {_listed(keys)}" for name, keys in lists if keys)]))


class ExportError(TokenpruneError, RuntimeError):
    """A model cannot be exported, or its file does not agree with it."""


class CountingError(TokenpruneError, RuntimeError):
    """An operator does multiply-adds that cannot be counted."""


class PictureError(TokenpruneError, ValueError):
    """An image, or the run of a recipe, that cannot be shown."""


class MissingExtraError(TokenpruneError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


def _listed(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class UnknownModelError(TokenpruneError, LookupError):
    """No model has this name, neither a saved one nor one of a library."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of an optional dependency: if one is missing, say which extra to install.

    Raises:
        MissingExtraError: It is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"this needs {error.name}, which is not installed; pip install 'tokenprune[{name}]' brings it."
        ) from error
