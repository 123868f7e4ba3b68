"""Calls of the command line."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from tokenprune.cli import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120"})


def fields(*arguments: str) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)
