"""The command line ``tokenprune``.

Each command is one file in `tokenprune.cli.commands`, with a function of the file's name; a file that is put there is a
command.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

import typer

from tokenprune.cli import commands
from tokenprune.cli.group import OneLineGroup

app = typer.Typer(
    cls=OneLineGroup,
    name="tokenprune",
    help="Count, measure and look at Vision Transformers that drop the tokens they do not need.",
    epilog="Exit codes: 0 = done, 1 = it failed, such as on a model that is not supported, 2 = bad arguments.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and stop."),
    debug: bool = typer.Option(False, "--debug", help="Show the whole traceback of an error."),
) -> None:
    if version:
        import tokenprune

        typer.echo(tokenprune.__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _module in sorted(iter_modules(commands.__path__), key=lambda module: module.name):
    _loaded = import_module(f"{commands.__name__}.{_module.name}")
    app.command(_module.name, no_args_is_help=False)(getattr(_loaded, _module.name))


def main() -> None:
    """Run the command line with the arguments of this process."""
    app(prog_name="tokenprune")
