"""Pictures of kept tokens: what the stages kept, by what scores, on which pixels, and how pictures become inputs."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform, resolve_data_config
from torch import nn

import tokenprune
from tests.helpers.zoo import BY_NAME, Case, hook_counts, some_models
from tokenprune.analysis.overlays import UNSCORED, VEIL, VEIL_OPACITY, coloured, heat_maps, pictures_of
from tokenprune.backbones.adapters import preprocessing_of

PHOTOS = load_sample_images().images  # a temple and a flower, 427 × 640


def small_vit(**options: Any) -> nn.Module:
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2}
    return tokenprune.sparsify(timm.models.VisionTransformer(**{**sizes, **options}), (2, 4), 0.6)


@some_models
@pytest.mark.parametrize("scorer", ["predictor", "cls_attention"])
def test_what_is_shown_is_what_the_model_kept_and_why(case: Case, scorer: str) -> None:
    model = case.sparsified(scorer=scorer)
    images = case.images()
    model.train()
    hooks, modes = hook_counts(model), [module.training for module in model.modules()]
    kept = tokenprune.kept_tokens(model, images)
    assert hook_counts(model) == hooks and [module.training for module in model.modules()] == modes
    assert model.tokenprune.execution == "auto"

    trace = model.tokenprune.trace
    counts = model.tokenprune.plan.num_keep(case.num_patches)
    before = torch.ones(len(images), case.num_patches, dtype=torch.bool)
    for stage, (keep, scores) in enumerate(zip(kept.keep, kept.scores, strict=True)):
        assert kept.grid == trace.grid and keep.shape == (len(images), *trace.grid)
        keep, scores = keep.flatten(1), scores.flatten(1)
        assert torch.equal(keep, trace.keep[stage].bool())
        assert kept.num_kept(stage) == counts[stage]
        # Scored is exactly what had reached the stage, and kept are the best of these.
        assert torch.equal(scores.isfinite(), before)
        assert torch.equal(scores.nan_to_num(-torch.inf).topk(counts[stage]).indices.sort().values,
                           trace.indices[stage])  # fmt: skip
        before = keep


def test_a_stage_that_keeps_all_it_gets_scores_nothing() -> None:
    model = BY_NAME["timm class token"].sparsified()
    model.tokenprune.keep_ratio = (0.5, 0.5)
    kept = tokenprune.kept_tokens(model, BY_NAME["timm class token"].images())
    assert kept.scores[0].isfinite().all() and kept.scores[1].isnan().all()
    assert torch.equal(kept.keep[0], kept.keep[1])
    maps = heat_maps(kept, 2)
    assert maps is not None and maps.isnan().all()
    tokenprune.show(model, BY_NAME["timm class token"].images())


@pytest.mark.parametrize(
    "height, width, patch", [(48, 48, (8, 8)), (50, 45, (8, 8)), (32, 64, (8, 8)), (48, 48, (8, 4)), (50, 45, (4, 12))]
)
def test_pixels_go_with_their_patch(height: int, width: int, patch: tuple[int, int]) -> None:
    model = small_vit(patch_size=patch, dynamic_img_size=True, dynamic_img_pad=True)
    kept = tokenprune.kept_tokens(model, torch.randn(2, 3, height, width))
    rows, columns = kept.grid
    assert (rows, columns) == (-(-height // patch[0]), -(-width // patch[1]))
    pixels = pictures_of(kept, 0)
    assert pixels.min() == 0 and pixels.max() == 1  # normal numbers leave the range
    assert torch.equal(pixels, kept.pixels.movedim(1, -1))
    veiled = (1 - VEIL_OPACITY) * pixels + VEIL_OPACITY * torch.tensor(VEIL)
    for stage, image, row, column in itertools.product(range(2), range(2), range(rows), range(columns)):
        place = (
            image,
            slice(patch[0] * row, patch[0] * (row + 1)),
            slice(patch[1] * column, patch[1] * (column + 1)),
        )
        expected = pixels if kept.keep[stage][image, row, column] else veiled
        torch.testing.assert_close(pictures_of(kept, stage + 1)[place], expected[place])


def test_a_model_in_training_mode_is_looked_at_in_eval_mode() -> None:
    model = small_vit(proj_drop_rate=0.5).train()
    images = torch.randn(2, 3, 48, 48)
    first, second = tokenprune.kept_tokens(model, images), tokenprune.kept_tokens(model, images)
    assert all(
        torch.equal(one.nan_to_num(), two.nan_to_num()) for one, two in zip(first.scores, second.scores, strict=True)
    )


def test_pictures_become_what_timm_makes_of_them() -> None:
    for name, options in (("deit_tiny_patch16_224", {}), ("vit_tiny_patch16_384", {}), ("beit_base_patch16_224", {}),
                          ("deit_tiny_patch16_224", {"img_size": 160})):  # fmt: skip
        model = timm.create_model(name, depth=1, **options)
        found = preprocessing_of(model)
        size = (3, *model.patch_embed.img_size)
        config = resolve_data_config({"input_size": size}, model=model)
        expected = create_transform(**config)(Image.fromarray(PHOTOS[0]))
        assert torch.equal(found.apply(PHOTOS[0]), expected) or (found.apply(PHOTOS[0]) - expected).abs().max() < 1e-6


def test_pictures_become_what_torchvision_makes_of_them() -> None:
    from torchvision.models import VisionTransformer, ViT_B_16_Weights

    found = preprocessing_of(VisionTransformer(224, 16, 1, 2, 32, 64))
    expected = ViT_B_16_Weights.IMAGENET1K_V1.transforms()(Image.fromarray(PHOTOS[1]))
    torch.testing.assert_close(found.apply(PHOTOS[1]), expected, atol=1e-6, rtol=0)


PROCESSORS = {
    "CLIPImageProcessor": {"size": {"shortest_edge": 66}, "crop_size": {"height": 48, "width": 48}},
    "ViTImageProcessor": {"size": {"height": 48, "width": 48}, "image_mean": [0.1, 0.2, 0.3]},
    "DeiTImageProcessor": {"size": {"height": 56, "width": 56}, "crop_size": {"height": 48, "width": 48}},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_pictures_become_what_the_saved_processor_makes_of_them(name: str, tmp_path: Path) -> None:
    processor = getattr(transformers, name)(**PROCESSORS[name])
    BY_NAME["transformers ViT classifier"].build().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    photo = Image.fromarray(PHOTOS[0])
    ours = preprocessing_of(model).apply(photo)
    theirs = torch.as_tensor(np.asarray(processor(photo)["pixel_values"][0]))
    # A processor may resize with torch's kernels, which round otherwise than Pillow's, by a shade or two of 255. (It
    # also puts an odd margin's pixel on the other side than the other libraries; here margins are even.)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().mean() < 0.02 * theirs.std()


def test_without_a_processor_the_usual_one_of_the_family_counts() -> None:
    # https://arxiv.org/abs/2103.00020: CLIP's mean; ViT's is one half.
    found = preprocessing_of(BY_NAME["transformers CLIP"].build())
    assert found.size == (48, 48) and found.mean[0] == pytest.approx(0.48145466)
    assert preprocessing_of(BY_NAME["transformers ViT"].build()).mean == pytest.approx((0.5, 0.5, 0.5))


def test_every_kind_of_picture_shows_the_same(tmp_path: Path) -> None:
    model = small_vit()
    file = tmp_path / "temple $x$.png"
    photo = Image.fromarray(PHOTOS[0])
    photo.save(file)
    same: list[Any] = [file, str(file), photo, PHOTOS[0], PHOTOS[0].astype(np.float64) / 255, photo.convert("RGBA")]
    kept = tokenprune.kept_tokens(model, same)
    assert kept.names == (file.name, file.name, "", "", "", "")
    for index in range(len(same)):
        assert torch.equal(kept.pixels[index], kept.pixels[0]) and torch.equal(kept.keep[1][index], kept.keep[1][0])
    # A tensor is what the model gets, normalised already.
    inputs = preprocessing_of(model).apply(photo)
    for given in (inputs, inputs.unsqueeze(0)):
        torch.testing.assert_close(tokenprune.kept_tokens(model, given).pixels[0], kept.pixels[0])
    figure = tokenprune.show(model, file)
    figure.savefig(tmp_path / "out.png")  # a name is a name, and no formula


def test_a_photograph_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    file = tmp_path / "turned.jpg"
    Image.fromarray(PHOTOS[0]).rotate(90, expand=True).save(file, exif=exif, quality=95)
    model = small_vit()
    kept = tokenprune.kept_tokens(model, [file, PHOTOS[0]])
    assert (kept.pixels[0] - kept.pixels[1]).abs().mean() < 0.02


@pytest.mark.parametrize("fit, same_proportions", [("cover", True), ("contain", True), ("squash", False)])
def test_a_picture_is_fitted(fit: Any, same_proportions: bool) -> None:
    tall = np.zeros((200, 100, 3), np.uint8)
    tall[80:120, 30:70] = 255  # a square
    found = tokenprune.Preprocessing(size=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3, fit=fit, interpolation="box")
    pixels = found.undo(found.apply(tall))
    bright = pixels[0] > 0.7
    height, width = int(bright.any(1).sum()), int(bright.any(0).sum())
    assert (abs(height - width) <= 1) is same_proportions
    if fit == "contain":
        assert torch.allclose(pixels[:, :, 0], torch.tensor(0.5), atol=0.01)  # a margin of the mean


def test_the_figure_has_a_column_an_image_and_a_row_a_stage(tmp_path: Path) -> None:
    model = small_vit()
    figure = tokenprune.show(model, list(PHOTOS), title="two photographs")
    assert len([axis for axis in figure.axes if axis.get_images()]) == 2 * (1 + 2 * 2)
    assert figure.axes[0].get_ylabel() == "36 patches"
    assert figure.axes[8].get_ylabel() == f"stage 2\nkeeps {12 / 36:.0%}"
    plain = tokenprune.show(model, list(PHOTOS), scores=False)
    assert len(plain.axes) == 6
    kept = tokenprune.kept_tokens(model, list(PHOTOS))
    np.testing.assert_allclose(plain.axes[5].get_images()[0].get_array(), pictures_of(kept, 2)[1], atol=1e-6)
    file = tmp_path / "kept.png"
    figure.savefig(file)
    with Image.open(file) as picture:
        assert picture.width > picture.height / 2 > 100


def test_the_animation_steps_through_the_stages(tmp_path: Path) -> None:
    file = tmp_path / "kept.gif"
    tokenprune.animate(small_vit(), list(PHOTOS), file, seconds=0.5)
    with Image.open(file) as picture:
        assert picture.n_frames == 3 and picture.info["loop"] == 0
        frames = []
        for number in range(3):
            picture.seek(number)
            assert picture.info["duration"] == 500
            frames.append(np.asarray(picture.convert("RGB"), dtype=float))
    assert all((first != second).mean() > 0.05 for first, second in itertools.pairwise(frames))
    with pytest.raises(tokenprune.PictureError, match=r"seconds=0.*at least 0.02"):
        tokenprune.animate(small_vit(), PHOTOS[0], file, seconds=0)


def test_heat_maps_are_of_an_image_and_a_stage() -> None:
    model = BY_NAME["timm class token"].sparsified()
    kept = tokenprune.kept_tokens(model, BY_NAME["timm class token"].images())
    maps = heat_maps(kept, 2)
    assert maps is not None
    for scores, shown in zip(kept.scores[1].flatten(1), maps.flatten(1), strict=True):
        scored = scores.isfinite()
        assert shown[scored].min() == 0 and shown[scored].max() == 1 and shown[~scored].isnan().all()
        order = scores[scored].argsort()
        assert (shown[scored][order].diff() >= 0).all()
        # Two per cent at either end share a colour, which of so few patches are the best and the worst one.
        assert (shown[scored] == 1).sum() == (shown[scored] == 0).sum() == 1
        colours = coloured(shown.reshape(kept.grid)).flatten(0, 1)
        assert (colours[~scored] == torch.tensor(UNSCORED)).all() and (colours[scored][:, 3] == 1).all()
        assert len(colours[scored].unique(dim=0)) > scored.sum() / 2


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "no image"),
        ("nowhere.png", "nowhere.png cannot be read: No such file"),
        (3, "a int is no picture"),
        (np.zeros((4, 4, 7), np.uint8), r"\(4, 4, 7\) is no picture"),
        (np.full((4, 4, 3), 255.0), "outside of 0 … 1"),
        (np.zeros((4, 4, 3), np.int64), "int64 is no picture"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "uint8 is no input"),
        (torch.zeros(8, 8), "is no input of this model"),
        ([torch.zeros(3, 48, 48), torch.zeros(3, 56, 56)], "several sizes: 48 × 48, 56 × 56"),
    ],
)
def test_what_is_no_picture_is_refused(
    given: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(tokenprune.PictureError, match=message):
        tokenprune.kept_tokens(small_vit(), given)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(PHOTOS[0]).save(tmp_path / "whole.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    with pytest.raises(tokenprune.PictureError, match="no picture of a kind"):
        tokenprune.show(small_vit(), tmp_path / "text.png")
    with pytest.raises(tokenprune.PictureError, match=r"torn.png cannot be read"):
        tokenprune.show(small_vit(), tmp_path / "torn.png")


@pytest.mark.parametrize(
    "options, message",
    [({"size": (0, 4)}, "size"), ({"std": (1, 0, 1)}, "std"), ({"mean": (0.5,)}, "as many of both"),
     ({"fit": "stretch"}, "cover, contain, squash"), ({"interpolation": "cubic"}, "bicubic"),
     ({"resize": (3,)}, "resize")],
)  # fmt: skip
def test_preprocessing_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(tokenprune.PictureError, match=message):
        tokenprune.Preprocessing(**{"size": (4, 4), "mean": (0.5,) * 3, "std": (0.5,) * 3, **options})


class Own(nn.Module):
    """A model that no adapter knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 8, 8)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.mean(dim=1)


def test_a_model_of_ones_own_needs_preprocessing_and_a_grid() -> None:
    model, own = Own().eval(), tokenprune.Preprocessing(size=(48, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    described = {"blocks": model.blocks, "num_prefix_tokens": 0, "embed_dim": 16}
    tokenprune.sparsify(model, (2,), 0.5, backbone=tokenprune.Backbone(**described))
    with pytest.raises(tokenprune.UnsupportedModelError, match="pass preprocessing="):
        tokenprune.show(model, PHOTOS[0])
    with pytest.raises(tokenprune.UnsupportedModelError, match="24 patches of this Own make no grid"):
        tokenprune.show(model, PHOTOS[0], preprocessing=own)
    tokenprune.unsparsify(model)
    tokenprune.sparsify(model, (2,), 0.5, backbone=tokenprune.Backbone(**described, patch_size=(8, 8)))
    assert tokenprune.kept_tokens(model, PHOTOS[0], preprocessing=own).grid == (6, 4)


def test_a_dense_model_shows_nothing() -> None:
    model = small_vit()
    with tokenprune.dense(model), pytest.raises(tokenprune.StateError, match="runs dense"):
        tokenprune.show(model, PHOTOS[0])
    with pytest.raises(tokenprune.StateError, match="not sparsified"):
        tokenprune.show(tokenprune.unsparsify(model), PHOTOS[0])


@pytest.mark.parametrize("missing", ["matplotlib", "PIL", "jinja2"])
def test_a_missing_library_is_named_with_its_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_vit()
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    call = tokenprune.report if missing == "jinja2" else tokenprune.show
    arguments = {"keep_ratios": ()} if missing == "jinja2" else {"images": PHOTOS[0]}
    with pytest.raises(tokenprune.MissingExtraError, match=rf"{missing}.*tokenprune\[plots\]"):
        call(model, **arguments)
