"""How the command line ends: with an exit code that means something, and an error in one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from tokenprune.errors import PictureError, PlanError, TokenpruneError, UnknownModelError

FAILED, BAD_ARGUMENTS = 1, 2


class OneLineGroup(TyperGroup):
    """A group of commands whose errors are one line on stderr, without usage and boxes.

    Exit code 2 means that the arguments are bad, an unknown model and impossible ratios among them; 1 that what
    was asked for failed.
    """

    def main(self, args: Sequence[str] | None = None, **options: Any) -> Any:  # type: ignore[override]
        """Run, and leave the process with an exit code."""
        given = list(sys.argv[1:] if args is None else args)
        options["standalone_mode"] = False
        options.setdefault("obj", given)  # for commands that say how they were called
        try:
            code = super().main(given, **options)
        except Exception as error:
            if "--debug" in given and not _is_usage(error):
                raise
            message, code = _verdict(error)
            typer.echo(f"Error: {message}", err=True)
        sys.exit(code if isinstance(code, int) else 0)


def _is_usage(error: Exception) -> bool:
    return hasattr(error, "format_message")


def _verdict(error: Exception) -> tuple[str, int]:
    # Typer brings the exceptions of click under one name or another, depending on its version.
    if _is_usage(error):
        message: str = error.format_message()  # type: ignore[attr-defined]
        return _one_line(message), BAD_ARGUMENTS
    if type(error).__name__ == "Abort":
        return "interrupted.", FAILED
    if isinstance(error, (PictureError, PlanError, UnknownModelError)):
        return _one_line(str(error)), BAD_ARGUMENTS
    if isinstance(error, TokenpruneError):
        return str(error), FAILED
    return f"{type(error).__name__}: {_one_line(str(error))} (tokenprune --debug … shows where)", FAILED


def _one_line(message: str) -> str:
    return " ".join(message.split())
