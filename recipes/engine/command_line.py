"""Settings from the command line: every field of a dataclass is an option, with defaults from a YAML file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
import yaml
from accelerate import PartialState
from rich.console import Console

from recipes.engine.checkpoints import Interrupted
from recipes.engine.data import DataError
from recipes.engine.options import annotations_of
from recipes.engine.settings import SettingsError

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings that a flag stands for.

    Attributes:
        help: What the flag is for.
        settings: Their values by name.
        prepare: Called with the settings before the recipe runs.
    """

    help: str
    settings: Mapping[str, Any]
    prepare: Callable[[Any], None] = lambda settings: None


def command(
    settings_class: type[Settings],
    run: Callable[[Settings], Any],
    *,
    help_text: str | None,
    presets: Mapping[str, Preset],
) -> typer.Typer:
    """A command whose options are the fields of a dataclass.

    Args:
        settings_class: A dataclass of settings; see `recipes.engine.options.annotations_of`.
        run: Called with the settings.
        help_text: The text above the options in ``--help``.
        presets: By name of a flag, such as ``smoke``. Options on the command line override presets, and presets
            override ``--config``.
    """
    names = {field.name for field in fields(settings_class)}  # type: ignore[arg-type]

    def call(context: typer.Context, config: Path | None, **options: Any) -> None:
        values = {name: value for name, value in options.items() if name in names}
        try:
            settings = settings_class(**values)
            for name, preset in presets.items():
                if options[_flag(name)]:
                    preset.prepare(settings)
            run(settings)
            # Threads of a group that is left may end a run that is over with an error, for which a launcher kills the
            # other processes: not while the first one still writes.
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                PartialState().wait_for_everyone()
                torch.distributed.destroy_process_group()
        except (SettingsError, DataError, FileExistsError) as error:
            raise typer.BadParameter(str(error)) from None
        except Interrupted as interrupted:
            console = Console(stderr=True)
            console.print(f"[yellow]Interrupted.[/] {interrupted} Add --resume to the same command to continue.")
            raise typer.Exit(130) from None
        except FloatingPointError as error:
            Console(stderr=True).print(f"[red]Stopped:[/] {error}")
            raise typer.Exit(1) from None

    def read_config(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None:
            _add_defaults(context, _read_yaml(path, names), override=False)
        return path

    def use_preset(name: str) -> Callable[[typer.Context, bool], bool]:
        def use(context: typer.Context, chosen: bool) -> bool:
            if chosen:
                _add_defaults(context, presets[name].settings, override=True)
            return chosen

        return use

    parameters = [
        inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        _parameter(
            "config",
            Annotated[
                Path | None,
                typer.Option(
                    help="A YAML file of settings.", is_eager=True, callback=read_config, exists=True, dir_okay=False
                ),
            ],
            None,
        ),
        *(
            _parameter(
                _flag(name),
                Annotated[
                    bool,
                    typer.Option(f"--{name}", help=preset.help, is_eager=True, callback=use_preset(name)),
                ],
                False,
            )
            for name, preset in presets.items()
        ),
        *_parameters(settings_class),
    ]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__doc__ = help_text
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=help_text)(call)
    return app


def _flag(preset: str) -> str:
    return f"preset_{preset}".replace("-", "_")


def _parameters(settings_class: type) -> list[inspect.Parameter]:
    annotations = annotations_of(settings_class)
    return [_parameter(field.name, annotations[field.name], _default(field)) for field in fields(settings_class)]


def _default(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    return inspect.Parameter.empty if field.default_factory is MISSING else field.default_factory()


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    # Without an Option of its own, a field that has no default would become a positional argument.
    if getattr(annotation, "__metadata__", None) is None:
        annotation = Annotated[annotation, typer.Option()]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _read_yaml(path: Path, names: set[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"{path} is not YAML: {error}".replace("\n", " ")) from None
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path} holds no mapping of settings to values.")
    unknown = sorted(set(values) - names)
    if unknown:
        raise typer.BadParameter(f"{path} has settings that are unknown: {', '.join(map(str, unknown))}.")
    return {name: value for name, value in values.items() if value is not None}


def _add_defaults(context: typer.Context, values: Mapping[str, Any], *, override: bool) -> None:
    """Add to the context's defaults; ``override``: also where it has some already."""
    there = dict(context.default_map or {})
    context.default_map = {**there, **values} if override else {**values, **there}
