"""JSON that is damaged, and what is none."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.generated.strategies.common import FLOATS

SMALL_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 70), FLOATS, st.text(max_size=4), st.just(10**400)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=4,
)
NO_JSON = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", "{", "[" * 20_000, '{"version": 1', "1" * 5000, "\x00", "\ud800", '{"a": 1}{"a": 1}', "nul"]),
)


def paths_of(fields: Any) -> list[tuple[Any, ...]]:
    """Where there is something in a tree of JSON."""
    inner = fields.items() if isinstance(fields, dict) else enumerate(fields) if isinstance(fields, list) else ()
    return [(), *((key, *path) for key, value in inner for path in paths_of(value))]


@st.composite
def damaged_json(draw: st.DrawFn, fields: Any) -> Any:
    """A tree of JSON in which one or two places hold something else, or nothing. Changes ``fields``."""
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(paths_of(fields)))
        if not path:
            if draw(st.integers(0, 4)) == 0:
                return draw(SMALL_JSON)
            continue
        inner = fields
        for key in path[:-1]:
            inner = inner[key]
        if draw(st.integers(0, 3)) == 0:
            del inner[path[-1]]
        else:
            inner[path[-1]] = draw(SMALL_JSON)
    return fields
