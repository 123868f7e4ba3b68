"""Optional dependencies, imported when they are needed; if one is missing, the error names the extra to install."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tokenprune.errors import MissingExtraError


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
