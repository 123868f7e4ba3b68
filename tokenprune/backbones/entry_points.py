"""Which libraries have an adapter: the entry points of the group ``tokenprune.adapters``.

An entry point is named after the root package of the models' classes. Nothing is imported here.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, packages_distributions, version

ENTRY_POINT_GROUP = "tokenprune.adapters"


def adapter_entries() -> dict[str, EntryPoint]:
    """The entry point of every adapter that is installed, by the library's root package."""
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


def libraries() -> tuple[str, ...]:
    """Root packages of the libraries that have an adapter, whether or not they are installed."""
    return tuple(sorted(adapter_entries()))


def installed_version(library: str) -> str | None:
    """The version of a library that is installed, found without loading it; ``None`` if it is not."""
    names = (library, *packages_distributions().get(library, ()))
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
