"""Adapters of third parties: how they are found, what the base class refuses for them, the table they may bring."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenprune
from tokenprune import Adapter, Backbone, CheckpointError, Preprocessing, SupportedModel, UnsupportedModelError
from tokenprune.backbones import supported as tables
from tokenprune.backbones.adapters import adapter, describe, model_of, preprocessing_of
from tokenprune.saving.named import load_from_library
from tokenprune.saving.rebuilding import build, identify

LIBRARY = __name__.partition(".")[0]  # the root package of MyViT's class
IMAGES = (2, 3, 32, 32)


class MyViT(nn.Module):
    """A model of a library that has an adapter by a third party."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 8, 8)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(4))
        self.head = nn.Linear(16, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens.mean(dim=1))


class Describes(Adapter):
    """No more than an adapter has to have."""

    def describe(self, model: nn.Module) -> Backbone:
        return Backbone(blocks=tuple(model.blocks), num_prefix_tokens=0, embed_dim=16)


class Whole(Describes):
    """Every method."""

    def identity(self, model: nn.Module) -> dict[str, Any]:
        return {"classes": model.head.out_features}

    def build(self, identity: dict[str, Any], *, pretrained: bool = False) -> nn.Module:
        return MyViT(**identity)

    def load(self, name: str, *, pretrained: bool = False, image_size: tuple[int, int] | None = None) -> nn.Module:
        if name not in self.names():
            raise LookupError("no model of that name")
        return MyViT()

    def names(self) -> Iterable[str]:
        return ("my_own_vit",)

    def preprocessing(self, model: nn.Module) -> Preprocessing:
        return Preprocessing(size=IMAGES[2:], mean=(0.5,) * 3, std=(0.25,) * 3)

    def from_state_dict(self, state: Mapping[str, Tensor], *, num_heads: int | None) -> nn.Module:
        if state.keys() != MyViT().state_dict().keys():
            raise CheckpointError("not MyViT's weights.", missing=["head.weight"])
        return MyViT(len(state["head.bias"]))


class NeedsAnArgument(Describes):
    """Cannot be made by an entry point."""

    def __init__(self, argument: int) -> None:
        self.argument = argument


class DescribesNothing(Adapter):
    """Leaves out the one method that has to be written."""


whole = Whole()

Register = Callable[..., None]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Makes the adapter of MyViT known, beside ours or alone, as an installed package would."""
    from tokenprune.backbones import entry_points as found

    ours = found.entry_points(group=found.ENTRY_POINT_GROUP)

    def register(value: str, *, alone: bool = False) -> None:
        entry = EntryPoint(name=LIBRARY, value=value, group=found.ENTRY_POINT_GROUP)
        monkeypatch.setattr(found, "entry_points", lambda group: [entry] if alone else [*ours, entry])

    return register


def module(monkeypatch: pytest.MonkeyPatch, **contents: Any) -> str:
    """A module with these contents, that can be imported by its name."""
    made = ModuleType("an_adapter")
    vars(made).update(contents)
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made.__name__


def functions_of(written: Adapter) -> dict[str, Any]:
    names = ("describe", "identity", "build", "load", "names", "preprocessing", "from_state_dict")
    return {name: getattr(written, name) for name in names}


# How an adapter is found


SPELLINGS: dict[str, Callable[[pytest.MonkeyPatch], str]] = {
    "an instance": lambda patch: f"{__name__}:whole",
    "a class": lambda patch: f"{__name__}:Whole",
    "a module that holds an instance": lambda patch: module(patch, adapter=whole),
    "a module that holds a class": lambda patch: module(patch, adapter=Whole),
    "a module of functions": lambda patch: module(patch, **functions_of(whole)),
    "a module of functions with a submodule of that name": lambda patch: module(
        patch, adapter=ModuleType("an_adapter.adapter"), **functions_of(whole)
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_whatever_an_entry_point_names(
    spelling: str, register: Register, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    register(SPELLINGS[spelling](monkeypatch))
    model = tokenprune.sparsify(MyViT(classes=3), (2,), 0.5).eval()
    loaded = tokenprune.from_pretrained(tokenprune.save_pretrained(model, tmp_path, model_card=False))
    images = torch.rand(IMAGES)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert isinstance(load_from_library("my_own_vit"), MyViT)
    with pytest.raises(tokenprune.UnknownModelError, match=r"tests: no model of that name.*Did you mean my_own_vit\?"):
        load_from_library("my_own_vitt")
    assert preprocessing_of(model).std == (0.25,) * 3
    assert isinstance(model_of(MyViT().state_dict(), num_heads=None), MyViT)


BROKEN = {
    "nowhere": r"'nowhere', and ModuleNotFoundError: No module named 'nowhere'\. Install the package",
    f"{__name__}:Missing": r"AttributeError: .*Missing",
    f"{__name__}:MyViT": r"TypeError: <class .*MyViT'> is neither an instance nor a subclass of tokenprune\.Adapter",
    f"{__name__}:IMAGES": r"TypeError: \(2, 3, 32, 32\) is neither",
    f"{__name__}:DescribesNothing": r"TypeError: Can't instantiate abstract class DescribesNothing .*describe",
    f"{__name__}:NeedsAnArgument": r"TypeError: .*argument",
}


@pytest.mark.parametrize("value", BROKEN)
def test_an_entry_point_that_names_no_adapter(value: str, register: Register) -> None:
    register(value)
    message = rf"(?s)the adapter for {LIBRARY} cannot be used: .*{BROKEN[value]}"
    with pytest.raises(UnsupportedModelError, match=message):
        tokenprune.sparsify(MyViT())
    # What the other adapters can do goes on.
    with pytest.raises(tokenprune.UnknownModelError, match=rf"{LIBRARY}: the adapter for {LIBRARY} cannot be used"):
        load_from_library("nothing_of_that_name")
    assert type(load_from_library("test_vit")).__module__.startswith("timm")
    assert tokenprune.supported(LIBRARY) == () and tokenprune.supported("timm")
    with pytest.raises(UnsupportedModelError, match=r"no adapter knows .*Linear"):
        tokenprune.sparsify(nn.Linear(2, 2))


# What the base class refuses


@pytest.mark.parametrize("spelling", ["class", "module"])
def test_with_a_description_alone_models_are_pruned_and_the_rest_is_refused(
    spelling: str, register: Register, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    as_module = spelling == "module"
    register(module(monkeypatch, describe=Describes().describe) if as_module else f"{__name__}:Describes")
    who = "the adapter an_adapter" if as_module else rf"the adapter {__name__}\.Describes"
    model, images = tokenprune.sparsify(MyViT(), (2,), 0.5).eval(), torch.rand(IMAGES)
    assert tokenprune.verify(model, images).passed

    why = rf"{who} does not say from what a MyViT is built again; build the model yourself"
    with pytest.warns(UserWarning, match=f"will need model=.*{why}"):
        tokenprune.save_pretrained(model, tmp_path, model_card=False)
    with pytest.raises(CheckpointError, match=f"{why}.*pass model="):
        tokenprune.from_pretrained(tmp_path)
    loaded = tokenprune.from_pretrained(tmp_path, model=MyViT()).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))

    with pytest.raises(UnsupportedModelError, match=f"{who} does not build models; .*pass it as model="):
        build(LIBRARY, {})
    with pytest.raises(tokenprune.UnknownModelError, match=f"{LIBRARY}: {who} does not load models by name; load the"):
        load_from_library(f"{LIBRARY}:my_own_vit")
    with pytest.raises(UnsupportedModelError, match=f"{who} does not say how images become the input of a MyViT; pass"):
        tokenprune.kept_tokens(model, [images[0].permute(1, 2, 0).numpy()])
    with pytest.raises(CheckpointError, match=f"{who} builds no models from official checkpoints; build the model"):
        adapter(LIBRARY).from_state_dict({}, num_heads=None)


def test_adapters_that_build_from_no_weights_say_nothing_about_them(register: Register) -> None:
    register(f"{__name__}:Describes")
    with pytest.raises(CheckpointError, match=r"^the weights are neither DeiT's nor LV-ViT's") as refusal:
        model_of({"head.weight": torch.ones(1)}, num_heads=None)
    assert "cls_token" in refusal.value.missing
    register(f"{__name__}:Describes", alone=True)
    with pytest.raises(CheckpointError, match="no installed adapter builds models from official checkpoints"):
        model_of({}, num_heads=None)


def test_of_two_adapters_that_refuse_weights_both_are_heard(register: Register) -> None:
    register(f"{__name__}:Whole")
    with pytest.raises(
        CheckpointError, match=r"(?s)no adapter knows.*not MyViT's weights.*neither DeiT's nor LV-ViT's"
    ):
        model_of({"head.weight": torch.ones(1)}, num_heads=None)


# What folders of tokenprune 0.1 hold


IDENTITIES: dict[str, tuple[str, dict[str, Any]]] = {
    "timm, from an architecture": (
        "timm",
        {
            "architecture": "deit_tiny_patch16_224",
            "class": None,
            "pretrained_cfg": {"architecture": "deit_tiny_patch16_224", "num_classes": 1000},
            "options": {"num_classes": 7, "img_size": [48, 48], "patch_size": [8, 8], "depth": 2},
            "num_classes": 7,
        },
    ),
    "timm, from a class": (
        "timm",
        {
            "architecture": None,
            "class": "VisionTransformer",
            "pretrained_cfg": None,
            "options": {
                "num_classes": 7, "img_size": [48, 48], "patch_size": [8, 8], "embed_dim": 32, "depth": 2,
                "num_heads": 2, "qk_norm": True, "init_values": 0.5, "reg_tokens": 4, "no_embed_class": True,
            },
            "num_classes": 7,
        },
    ),
    "torchvision": (
        "torchvision",
        {
            "options": {
                "image_size": 48, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64,
                "dropout": 0.0, "attention_dropout": 0.1, "num_classes": 7, "representation_size": None,
            },
            "eps": 1e-06,
            "stem": [[8, 3, 2, "ReLU"], [32, 3, 4, "SiLU"]],
            "plain_head": True,
            "no_head": False,
            "num_classes": 7,
        },
    ),
    "transformers": (
        "transformers",
        {
            "class": "ViTForImageClassification",
            "config": {
                "model_type": "vit", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
                "num_hidden_layers": 2, "image_size": 48, "patch_size": 8, "id2label": {"0": "cat", "1": "dog"},
                "label2id": {"cat": 0, "dog": 1},
            },
            "hub_id": None,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities_in_folders_of_0_1(name: str) -> None:
    library, saved = IDENTITIES[name]
    again = identify(build(library, saved)).fields
    if library == "transformers":  # whose configs have more fields with each version
        assert saved["config"].items() <= again["config"].items()
        again = {**again, "config": saved["config"]}
    if saved.get("pretrained_cfg"):  # timm adds what the architecture has
        assert saved["pretrained_cfg"].items() <= again["pretrained_cfg"].items()
        again = {**again, "pretrained_cfg": saved["pretrained_cfg"]}
    assert again == saved


# The table of proved models


def model_named(name: str, family: str = "mine", **fields: Any) -> SupportedModel:
    texts = {"model_class": "MyViT", "pooling": "mean", "position_encoding": "none"}
    return SupportedModel(
        library=LIBRARY, family=family, name=name, side_inputs=(), passes=("identity", "undo"), **{**texts, **fields}
    )


@pytest.mark.parametrize("library", ["timm", "transformers", "torchvision"])
def test_our_tables_are_what_the_library_writes(library: str, tmp_path: Path) -> None:
    recorded, written = tables.supported_file(library), tmp_path / "supported.json"
    assert len(tokenprune.supported(library)) >= 5
    tables.write_supported(
        written, reversed(tokenprune.supported(library)), library_version=tables.proved_version(library)
    )
    assert written.read_bytes() == recorded.read_bytes()


@pytest.mark.parametrize("value", ["{}", "{}:adapter", "{}.inner:MyAdapter", "{}.missing:adapter"])
def test_a_table_lies_in_the_package_of_the_adapter(
    value: str, register: Register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "tokenprune_my_own_vits"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "inner.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    register(value.format(package.name))
    if "missing" in value:
        with pytest.raises(UnsupportedModelError, match=r"no place for supported.json of 'tests'"):
            tables.supported_file(LIBRARY)
        return
    file = tables.supported_file(LIBRARY)
    assert file == package / "supported.json" and tables.support_table(LIBRARY) is None
    assert tables.proved_version(LIBRARY) is None
    tables.write_supported(file, [model_named("b"), model_named("a"), model_named("c", "first")], library_version="2.0")
    assert tokenprune.supported(LIBRARY) == (model_named("c", "first"), model_named("a"), model_named("b"))
    assert tables.proved_version(LIBRARY) == "2.0"
    with pytest.raises(UnsupportedModelError, match=rf"{LIBRARY}: first, mine"):
        tokenprune.sparsify(nn.Linear(2, 2))


def test_a_module_that_is_in_no_package_has_no_place_for_a_table(
    register: Register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one_file_adapter.py").touch()
    (tmp_path / "supported.json").write_text("somebody else's")
    monkeypatch.syspath_prepend(tmp_path)
    register("one_file_adapter")
    assert tokenprune.supported(LIBRARY) == ()
    with pytest.raises(UnsupportedModelError, match="its adapter has to be installed, and in a package"):
        tables.supported_file(LIBRARY)
    with pytest.raises(UnsupportedModelError, match=r"no place for supported\.json of 'keras'"):
        tables.supported_file("keras")


def read(fields: Any) -> tables.SupportTable:
    return tables.SupportTable.from_json(json.dumps(fields), library=LIBRARY, where="supported.json")


def test_tables_of_other_formats_are_read_as_far_as_they_are_known() -> None:
    entry = model_named("a").to_dict()
    assert read({"models": [entry]}) == tables.SupportTable(models=(model_named("a"),), library_version=None, version=1)
    later = read({"version": 2, "library_version": "9", "models": [{**entry, "speed": 1.5}], "proved_by": "me"})
    assert later.models == (model_named("a"),) and later.version == 2 and later.library_version == "9"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "name=None: expected a string"),
        ({"passes": "identity"}, "passes='identity': expected a list of strings"),
        ({"side_inputs": [1]}, r"side_inputs=\[1\]: expected a list of strings"),
    ],
)
def test_a_damaged_table_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(tokenprune.TokenpruneError, match=rf"supported.json is no table .*{message}.*write_supported"):
        read({"models": [{**model_named("a").to_dict(), **change}]})


@pytest.mark.parametrize("fields", [[], {}, {"models": 3}, {"models": [3]}], ids=str)
def test_what_is_no_table_is_refused(fields: Any) -> None:
    with pytest.raises(tokenprune.TokenpruneError, match=r"supported.json is no table of proved models"):
        read(fields)
    with pytest.raises(tokenprune.TokenpruneError, match=r"no table of proved models \(JSONDecodeError"):
        tables.SupportTable.from_json("{", library=LIBRARY, where="x")


def test_a_damaged_table_hides_no_other_error(
    register: Register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "tokenprune_damaged"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "supported.json").write_text("{")
    monkeypatch.syspath_prepend(tmp_path)
    register(package.name)
    with pytest.raises(
        UnsupportedModelError, match=r"(?s)no adapter knows .*Linear.*supported.json is no table.*timm:"
    ):
        describe(nn.Linear(2, 2))
