"""The exceptions that tokenprune raises."""

from __future__ import annotations


class TokenpruneError(Exception):
    """Base of every exception that tokenprune raises on purpose."""


class PlanError(TokenpruneError, ValueError):
    """Stages or keep ratios do not make a plan."""


class UnsupportedModelError(TokenpruneError, TypeError):
    """The model cannot be sparsified, or not in the way that was asked for."""


class StateError(TokenpruneError, RuntimeError):
    """The call does not fit the state the model is in, such as sparsifying it twice."""


class InterceptionError(TokenpruneError, RuntimeError):
    """A masked forward pass reached code whose attention could not be masked."""


class CountingError(TokenpruneError, RuntimeError):
    """An operator does multiply-adds that cannot be counted."""


class CheckpointError(TokenpruneError, ValueError):
    """A saved model is damaged, incomplete, of a later version or of another model, or cannot be saved."""


class UnknownModelError(TokenpruneError, LookupError):
    """A name is that of no model, neither a saved one nor one of a library's."""
