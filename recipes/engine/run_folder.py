"""The folder of a run: whether a run may use it, and the settings saved in it."""

from __future__ import annotations

from pathlib import Path

import yaml

from recipes.engine.checkpoints import write_text
from recipes.engine.settings import RunSettings, Settings, SettingsError

# What may differ between a run and its continuation without changing what is computed.
FREE_ON_RESUME = frozenset({"resume", "output", "num_workers", "log_every", "checkpoint_every", "tracker", "data_dir"})


def check_folder(settings: RunSettings, *, holds_checkpoint: bool) -> None:
    """Refuse to replace the run in ``output``, or to continue it with other settings.

    Raises:
        SettingsError: There is a checkpoint and ``resume`` is off, or the settings would give another result.
    """
    if holds_checkpoint and not settings.resume:
        raise SettingsError(f"{settings.output} holds a run already; add --resume, or take another --output.")
    if continues(settings):
        check_continuation(settings)


def continues(settings: RunSettings) -> bool:
    """Whether the run in ``output`` is continued, with the settings saved there."""
    return settings.resume and settings_file(settings.output).exists()


def check_continuation(settings: Settings) -> None:
    """Refuse settings that would give another result than those of the run in ``output``.

    Raises:
        SettingsError: The message says what differs.
    """
    before, now = yaml.safe_load(settings_file(settings.output).read_text()), settings.to_dict()
    changed = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in dict.fromkeys((*before, *now))
        if name not in FREE_ON_RESUME and before.get(name) != now.get(name)
    ]
    if changed:
        raise SettingsError(f"{settings.output} was made with other settings: {'; '.join(changed)}.")


def write_settings(settings: Settings) -> None:
    """Write the settings into ``output``, which is made if missing."""
    settings.output.mkdir(parents=True, exist_ok=True)
    write_text(settings_file(settings.output), settings.to_yaml())


def settings_file(folder: Path) -> Path:
    """The settings file in the folder of a run."""
    return folder / "settings.yaml"
