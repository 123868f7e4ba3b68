"""``tokenprune models``: what is supported, and what of it is installed."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from tokenprune.cli.options import Json
from tokenprune.cli.output import show, show_json

if TYPE_CHECKING:
    from rich.table import Table

    from tokenprune.backbones.supported import SupportedModel


def models(
    library: Annotated[
        str | None,
        typer.Argument(metavar="[LIBRARY]", help="List the models of one library by name.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the libraries and models that are supported, and what is installed.

    Models that are not listed may work as well; tokenprune.verify(model, images) tells.

    In Python: tokenprune.supported().
    """
    from tokenprune.backbones.entry_points import installed_version, libraries
    from tokenprune.backbones.supported import proved_version, supported

    known = libraries()
    if library is not None and library not in known:
        raise typer.BadParameter(f"{library!r} is no library with an adapter; choose from {', '.join(known)}.")
    chosen = known if library is None else (library,)
    proved = {name: supported(name) for name in chosen}
    if as_json:
        about = [
            {
                "name": name,
                "installed": installed_version(name),
                "proved_with": proved_version(name),
                "num_models": len(proved[name]),
            }
            for name in chosen
        ]
        show_json({"libraries": about, "models": [asdict(model) for name in chosen for model in proved[name]]})
        return
    rows = [(name, installed_version(name) or "no", proved_version(name) or "?", proved[name]) for name in chosen]
    show(_summary(rows))
    if library is not None:
        show(_names(library, proved[library]))
    else:
        show("tokenprune models LIBRARY lists names.")


def _summary(rows: list[tuple[str, str, str, tuple[SupportedModel, ...]]]) -> Table:
    from rich.table import Table

    table = Table(title="Supported libraries")
    for column in ("library", "installed", "proved with", "models", "families"):
        table.add_column(column, justify="right" if column == "models" else "left")
    for name, installed, version, models in rows:
        families = sorted({model.family for model in models})
        told = ", ".join(families[:6]) + (f" and {len(families) - 6} more" if len(families) > 6 else "")
        table.add_row(name, installed, version, str(len(models)), told)
    return table


def _names(library: str, models: tuple[SupportedModel, ...]) -> Table:
    from rich.table import Table

    table = Table(title=f"Models of {library} that the tests have proved")
    for column in ("family", "pruned", "names"):
        table.add_column(column)
    for (family, pruned), members in groupby(sorted(models, key=_kind), key=_kind):
        table.add_row(family, pruned, ", ".join(model.name for model in members))
    return table


def _kind(model: SupportedModel) -> tuple[str, str]:
    return model.family, model.pruned
