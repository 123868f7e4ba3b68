"""The Hub: downloading a repository, and uploading a saved model."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import nn

from tokenprune.errors import CheckpointError
from tokenprune.saving import card
from tokenprune.saving.manifest import MANIFEST
from tokenprune.saving.save import save_pretrained

_PATTERNS = [MANIFEST, "*.safetensors", "*.safetensors.index.json", "config.json"]


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    scorers_only: bool = False,
    model_card: bool = True,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Upload a sparsified model to the Hugging Face Hub, in one commit.

    Args:
        model: A sparsified model; it is left as it is.
        repo_id: Owner and name of the repository, which is made if it does not exist.
        scorers_only: As in `save_pretrained`.
        model_card: Whether to upload a model card; it replaces the repository's.
        private: Whether a new repository is private; ``None`` means the owner's default.
        revision: Branch to commit to; ``None`` means the main one.
        commit_message: Of the commit.
        token: For the Hub; ``None`` means the one that is stored on this machine.

    Returns:
        The address of the commit.

    Raises:
        StateError: The model is not sparsified.
        CheckpointError: It cannot be saved; see `save_pretrained`.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        # Saved first: what cannot be saved makes no repository.
        saved = save_pretrained(model, Path(folder) / "model", scorers_only=scorers_only, model_card=model_card)
        if model_card:
            text = (saved / card.FILE).read_text(encoding="utf-8")
            (saved / card.FILE).write_text(text.replace(card.SOURCE, repo_id), encoding="utf-8")
        api = HfApi(token=token)
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=saved,
            revision=revision,
            commit_message=commit_message or "A model sparsified by tokenprune",
        )
    return str(commit.commit_url)


def local_folder(
    source: str | Path, *, revision: str | None, token: str | bool | None, cache_dir: str | Path | None
) -> Path:
    """The folder of that name, or the repository of that id, fetched.

    Raises:
        CheckpointError: There is neither, or it cannot be fetched.
    """
    folder = Path(source)
    try:
        if folder.is_dir():
            return folder
        exists = folder.exists()
    except OSError as error:  # a name that is too long, as a rule
        raise CheckpointError(f"there is no folder {shortened(str(source))!r}: {error.strerror}.") from error
    if exists:
        raise CheckpointError(f"{folder} is a file; give the folder that holds it.")
    if isinstance(source, Path) or not is_repo_id(source):
        raise CheckpointError(
            f"there is no folder {str(source)!r}, and it is not the id of a Hub repository (owner/name)."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(source, revision=revision, token=token, cache_dir=cache_dir, allow_patterns=_PATTERNS)
        )
    except Exception as error:  # of many kinds, depending on the version and on its HTTP library
        raise CheckpointError(
            f"there is no folder {source!r}, and no Hub repository of that id could be fetched "
            f"({type(error).__name__}: {first_line(error)})."
        ) from error


def is_repo_id(name: str) -> bool:
    """Whether a name has the form of a Hub repository's id."""
    owner, slash, rest = name.partition("/")
    return bool(slash and owner.strip(".~") and rest) and "/" not in rest and "\\" not in name


def shortened(name: str) -> str:
    """The beginning of a name."""
    return name if len(name) <= 80 else f"{name[:80]}…"


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [""])[0]
