"""Sharing a sparsified model: its card, the Hub, and sources that do not exist."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tokenprune
from tests.helpers.saved import VIT, same_outputs


def test_the_card_has_the_table_and_how_to_load(tmp_path: Path) -> None:
    model = VIT.sparsified()
    tokenprune.save_pretrained(model, tmp_path)
    text = (tmp_path / "README.md").read_text()
    report = tokenprune.flops(model, (3, 48, 48))
    total = f"| **all** | {report.dense / 1e9:.3f} | {report.sparse / 1e9:.3f} | {report.ratio:.2f} |"
    assert total in text and "tokenprune.from_pretrained(" in text and "library_name: tokenprune" in text
    assert "blocks 0 … 1, 100.0% of the tokens" in text and "blocks 4 … 5, 36.0% of the tokens" in text
    (tmp_path / "README.md").write_text("mine")
    tokenprune.save_pretrained(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


class FakeHub:
    """Repositories in folders."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, list[dict[str, Any]]()

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(options)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> Any:
        self.calls.append(options)
        target = self.root / repo_id
        target.mkdir(parents=True, exist_ok=True)
        for file in Path(folder_path).iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return SimpleNamespace(commit_url=f"commit/of/{repo_id}")

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.calls.append(options)
        return str(self.root / repo_id)


def test_pushed_to_the_hub_and_fetched_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token=None: hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    model = VIT.sparsified()
    assert tokenprune.push_to_hub(model, "me/pruned", private=True, revision="dev") == "commit/of/me/pruned"
    assert hub.calls[0] == {"private": True, "exist_ok": True} and hub.calls[1]["revision"] == "dev"
    assert 'from_pretrained("me/pruned")' in (tmp_path / "me" / "pruned" / "README.md").read_text()
    names = sorted(file.name for file in (tmp_path / "me" / "pruned").iterdir())
    assert names == ["README.md", "tokenprune.json", "tokenprune.safetensors"]
    loaded = tokenprune.from_pretrained("me/pruned", revision="dev", token="t")
    assert hub.calls[-1]["revision"] == "dev" and hub.calls[-1]["token"] == "t" and same_outputs(model, loaded, VIT)
    hub.calls.clear()
    with pytest.raises(tokenprune.StateError):
        tokenprune.push_to_hub(VIT.model(), "me/dense")
    assert not hub.calls, "what cannot be saved makes no repository"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nobody/nothing", "no folder 'nobody/nothing', and no Hub repository"),
        ("nothing", "not the id of a Hub repository"),
        (Path("nobody/nothing"), "not the id of a Hub repository"),
        (Path(__file__), "is a file; give the folder"),
    ],
)
def test_a_source_that_does_not_exist_is_named(source: str | Path, message: str) -> None:
    with pytest.raises(tokenprune.CheckpointError, match=message):
        tokenprune.from_pretrained(source)
