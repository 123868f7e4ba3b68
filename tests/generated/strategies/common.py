"""What all areas share: shares of the profile, verdicts, and values that nobody expects."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple, NoReturn, TypeVar

from hypothesis import settings
from hypothesis import strategies as st

from tests.generated.outcomes import Users

Test = TypeVar("Test", bound=Callable[..., Any])


def share(percent: int) -> Callable[[Test], Test]:
    """Have a property tried with so much of what the profile has for an area."""
    return settings(max_examples=settings().max_examples * percent // 100)


class Given(NamedTuple):
    """An input, and whether it must work (``True``), must be refused (``False``) or may end either way (``None``)."""

    value: Any
    valid: bool | None


def _given(strategy: st.SearchStrategy[Any], valid: bool | None) -> st.SearchStrategy[Given]:
    return strategy.map(lambda value: Given(value, valid))


def mixed(good: st.SearchStrategy[Any], bad: st.SearchStrategy[Any]) -> st.SearchStrategy[Given]:
    """As often what must work as what must be refused."""
    return st.one_of(_given(good, True), _given(bad, False))


class Odd:
    """Nothing that anybody expects."""

    def __repr__(self) -> str:
        return "Odd()"


def fail(*given: Any) -> NoReturn:
    """A callable of the user's that fails."""
    raise Users("not today")


# Neither numbers nor sequences of them.
ODD = st.sampled_from([None, "half", "", b"3", {}, {"a": 1}, Odd(), Odd, float, 1j, [[]], [None], ["0.5"]])
HUGE = st.sampled_from([10**400, -(10**400), Fraction(10**400, 3), 2**63])
FLOATS = st.floats(allow_nan=True, allow_infinity=True)
