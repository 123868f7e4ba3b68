"""Loading what transformers writes by itself of a sparsified model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tokenprune
from tests.helpers.saved import VIT, manifest, same_outputs, save
from tests.helpers.zoo import BY_NAME


@pytest.mark.parametrize("name", ["transformers ViT", "transformers ViT classifier", "transformers SigLIP"])
def test_what_transformers_saves_of_a_sparsified_model_loads_back(name: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    model: Any = case.sparsified()
    model.tokenprune.keep_ratio = 0.4
    model.save_pretrained(tmp_path)
    loaded = tokenprune.from_pretrained(tmp_path)
    assert loaded.tokenprune.keep_ratio == (0.4, 0.4**2) and same_outputs(model, loaded, case)
    into = case.model()
    with torch.no_grad():
        next(into.parameters()).add_(0.1)
    assert same_outputs(model, tokenprune.from_pretrained(tmp_path, model=into), case)
    # To transformers it is the dense model that it was.
    dense = type(model).from_pretrained(tmp_path)
    with tokenprune.dense(model):
        assert same_outputs(model, dense, case)


def test_a_tower_that_transformers_does_not_export_comes_back(tmp_path: Path) -> None:
    from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
    from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

    case = BY_NAME["transformers SigLIP"]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2}
    config = Idefics2VisionConfig(image_size=48, patch_size=8, **sizes)
    model = tokenprune.sparsify(Idefics2VisionTransformer(config).eval(), (2, 4), 0.6)
    assert same_outputs(model, tokenprune.from_pretrained(save(model, tmp_path)), case)


def test_no_folder_of_this_machine_is_written_down(tmp_path: Path) -> None:
    dense: Any = BY_NAME["transformers ViT classifier"].model()
    dense.save_pretrained(tmp_path / "dense")
    model = tokenprune.sparsify(type(dense).from_pretrained(tmp_path / "dense"), (2, 4))
    save(model, tmp_path / "sparse")
    assert str(tmp_path) not in (tmp_path / "sparse" / "tokenprune.json").read_text()
    model.config._name_or_path = "google/vit-base-patch16-224"
    tokenprune.save_pretrained(model, tmp_path / "sparse")
    assert "base_model: google/vit-base-patch16-224" in (tmp_path / "sparse" / "README.md").read_text()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("class", "os.path.PurePath", "has no model 'os.path.PurePath'"),
        ("class", "transformers.models.nothing.Model", "has no model"),
        ("config", {"hidden_size": "wide"}, "does not build this ViTForImageClassification"),
    ],
)
def test_an_identity_that_is_none_is_refused(path: str, value: Any, message: str, tmp_path: Path) -> None:
    save(BY_NAME["transformers ViT classifier"].sparsified(), tmp_path)
    manifest(**{f"model__identity__{path}": value})(tmp_path)
    with pytest.raises(tokenprune.CheckpointError, match=message):
        tokenprune.from_pretrained(tmp_path)


def test_a_library_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(VIT.sparsified(), tmp_path)
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not there
    with pytest.raises(tokenprune.CheckpointError, match="timm is needed to build this model"):
        tokenprune.from_pretrained(tmp_path)
    manifest(model__library="keras")(tmp_path)
    with pytest.raises(tokenprune.CheckpointError, match="no adapter for 'keras' is installed"):
        tokenprune.from_pretrained(tmp_path)


def test_shards_and_dtypes_of_transformers_load_back(tmp_path: Path) -> None:
    case = BY_NAME["transformers ViT classifier"]
    model: Any = case.sparsified(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = tokenprune.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert same_outputs(model, loaded, case, case.images(dtype=torch.bfloat16))


def test_a_damaged_or_dense_folder_of_transformers_is_refused(tmp_path: Path) -> None:
    case = BY_NAME["transformers ViT classifier"]
    dense: Any = case.model()
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(tokenprune.CheckpointError, match="no safetensors file with a sparsified model's tensors"):
        tokenprune.from_pretrained(tmp_path / "dense")
    model: Any = case.sparsified()
    model.save_pretrained(tmp_path / "sparse")
    file = tmp_path / "sparse" / "model.safetensors"
    stored = load_file(file)
    name = next(name for name in stored if not name.startswith("tokenprune."))
    save_file({key: tensor for key, tensor in stored.items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(tokenprune.CheckpointError, match=r"cannot be loaded by the library.*do not fit"):
        tokenprune.from_pretrained(tmp_path / "sparse")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(tokenprune.CheckpointError, match="is damaged or truncated"):
        tokenprune.from_pretrained(tmp_path / "sparse")
