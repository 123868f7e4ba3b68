"""``tokenprune prove``: what must hold for pruned models, proved on the examples of an adapter."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from tokenprune.cli.group import FAILED
from tokenprune.cli.options import Json
from tokenprune.cli.output import show, show_json, step, working

if TYPE_CHECKING:
    from rich.table import Table

    from tokenprune.backbones.examples import Example
    from tokenprune.backbones.supported import SupportedModel


class Fault(NamedTuple):
    """An example that was not proved, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        reason = " ".join(self.reason.split())
        return reason if f"{self.name}: " in reason else f"{self.name}: {reason}"


class Outcome(NamedTuple):
    """What became of the examples, each in one of three lists."""

    proved: list[SupportedModel]
    failed: list[Fault]
    host_faults: list[Fault]


def prove(
    adapter: Annotated[
        str,
        typer.Argument(metavar="ADAPTER", help="Its library, as in timm, or its package.", show_default=False),
    ],
    examples: Annotated[
        str | None,
        typer.Option(
            "--examples",
            metavar="MODULE:FUNCTION",
            help="A function that returns the examples. Default: those that the adapter names.",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="Prove this model alone; repeat for several.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write the table of proved models here, if none failed. With --only, the other models of a table "
            "that is there stay in it.",
            show_default=False,
        ),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Whether to compile and export the examples that ask for it.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Prove what must hold on every example of an adapter, and write the table of proved models.

    A model that its own library cannot run untouched is that library's fault: it is listed, left out of the table, and
    does not make the command fail.

    In Python: tokenprune.prove(example, library=…).
    """
    from tokenprune.backbones.entry_points import installed_version

    library = _library(adapter)
    if output is not None and not output.parent.is_dir():
        raise typer.BadParameter(f"--output {output}: there is no folder {output.parent}.")
    others = _others(output, library, only) if output is not None and only else ()
    outcome = Outcome([], [], [])
    with _importing_from_here(), working(f"loading the examples of {library}") as progress:
        chosen = _chosen(_examples(library, examples), only or ())
        for done, example in enumerate(chosen):
            step(progress, f"proving {example.name}", done, len(chosen))
            _attempt(example, library, compiled, outcome)
    is_written = output is not None and not outcome.failed and bool(outcome.proved)
    if output is not None and is_written:
        _write(output, library, [*others, *outcome.proved])
    if as_json:
        show_json(_fields(library, outcome, output if is_written else None))
    else:
        show(_table(f"{library} {installed_version(library) or ''}", outcome))
        if output is not None:
            show(f"The table is in {output}." if is_written else f"{output} was not written.")
    if outcome.failed or not outcome.proved:
        raise typer.Exit(FAILED)


def _attempt(example: Example, library: str, compiled: bool, outcome: Outcome) -> None:
    from tokenprune.analysis.proof import prove
    from tokenprune.errors import HostError, TokenpruneError

    try:
        outcome.proved.append(prove(example, library=library, compiled=None if compiled else False))
    except HostError as error:
        outcome.host_faults.append(Fault(example.name, str(error)))
    except TokenpruneError as error:
        outcome.failed.append(Fault(example.name, str(error)))
    except Exception as error:  # whatever code of the adapter, of the example or of ours raises
        outcome.failed.append(Fault(example.name, f"{type(error).__name__}: {error}"))


def _library(name: str) -> str:
    """The library of an adapter that is named after it, or by its own package.

    Raises:
        typer.BadParameter: There is no such adapter.
    """
    from tokenprune.backbones.entry_points import adapter_entries

    entries = adapter_entries()
    found = [library for library, entry in entries.items() if name in (library, entry.module.partition(".")[0])]
    if not found:
        raise typer.BadParameter(
            f"there is no adapter {name!r}; installed are those for {', '.join(sorted(entries)) or 'nothing'}."
        )
    return name if name in found else found[0]


def _examples(library: str, where: str | None) -> list[Example]:
    """The examples that a function returns, or those that the adapter names.

    Raises:
        typer.BadParameter: There is no such function, or it returns something else.
    """
    from tokenprune.backbones.adapters import adapter
    from tokenprune.backbones.examples import Example

    make = adapter(library).examples if where is None else _function(where)
    found = make()
    examples = list(found) if isinstance(found, Iterable) else [found]
    other = next((one for one in examples if not isinstance(one, Example)), None)
    if other is not None or not examples:
        got = "nothing" if not examples else f"a {type(other).__name__}"
        raise typer.BadParameter(f"the examples of {where or library}: expected tokenprune.Examples, got {got}.")
    return examples


def _function(where: str) -> Callable[[], Iterable[Example]]:
    module, _, name = where.partition(":")
    try:
        function: Callable[[], Iterable[Example]] = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise typer.BadParameter(f"--examples {where}: expected MODULE:FUNCTION; {error}.") from error
    if not callable(function):
        raise typer.BadParameter(f"--examples {where}: {name} is not a function.")
    return function


@contextmanager
def _importing_from_here() -> Iterator[None]:
    """While it lasts, modules in the working directory can be imported, as with ``python -m``."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _chosen(examples: list[Example], only: Iterable[str]) -> list[Example]:
    names = list(dict.fromkeys(example.name for example in examples))
    for name in only:
        if name not in names:
            near = get_close_matches(name, names, n=3) or names[:3]
            raise typer.BadParameter(f"--only {name}: no example has that name; there are {', '.join(near)} …")
    return [example for example in examples if not only or example.name in only]


def _others(file: Path, library: str, only: Iterable[str]) -> list[SupportedModel]:
    """The models of a table that are not proved again.

    Raises:
        typer.BadParameter: They were proved on another release of the library.
    """
    from tokenprune.backbones.entry_points import installed_version
    from tokenprune.backbones.supported import SupportTable

    if not file.is_file():
        return []
    table = SupportTable.from_json(file.read_text(encoding="utf-8"), library=library, where=str(file))
    others = [model for model in table.models if model.name not in only]
    if others and table.library_version != installed_version(library):
        raise typer.BadParameter(
            f"--only: the models in {file} were proved on {library} {table.library_version}, and "
            f"{installed_version(library)} is installed; prove all, or write to another file."
        )
    return others


def _write(file: Path, library: str, models: list[SupportedModel]) -> None:
    from tokenprune.backbones.entry_points import installed_version
    from tokenprune.backbones.supported import merge_examples, write_supported

    try:
        write_supported(file, merge_examples(models), library_version=installed_version(library))
    except OSError as error:
        raise typer.BadParameter(f"--output {file}: {error.strerror}") from error


def _fields(library: str, outcome: Outcome, written: Path | None) -> dict[str, object]:
    from tokenprune.backbones.entry_points import installed_version
    from tokenprune.backbones.supported import merge_examples

    return {
        "library": library,
        "library_version": installed_version(library),
        "proved": [model.to_dict() for model in merge_examples(outcome.proved)],
        "failed": [fault._asdict() for fault in outcome.failed],
        "host_faults": [fault._asdict() for fault in outcome.host_faults],
        "output": None if written is None else str(written),
    }


def _table(title: str, outcome: Outcome) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"Examples of {title}")
    table.add_column("", no_wrap=True)
    table.add_column("examples", justify="right")
    table.add_column("which, and why")
    table.add_row("proved", str(len(outcome.proved)), "")
    for what, faults in (("failed", outcome.failed), ("not run by the library itself", outcome.host_faults)):
        table.add_row(what, str(len(faults)), escape("\n".join(map(str, faults))))
    return table
