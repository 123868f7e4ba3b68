"""An entry of the census: a small model of a library, and what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenprune import Example

STAGES, KEEP_RATIO = Example.stages, Example.keep_ratio


@dataclass(frozen=True, kw_only=True)
class Entry(Example):
    """An example for proofs, and the library that it is of."""

    library: str

    def __str__(self) -> str:
        return f"{self.library} {self.name}"

    def example(self, *, double: bool = False) -> dict[str, Any]:
        """The same inputs every time."""
        return self.arguments(double=double)
