"""The command line: what it prints, how it ends, and what it takes for a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import tokenprune
from tests.helpers.command_line import fields, run
from tests.helpers.runs import write_run
from tests.helpers.zoo import BY_NAME
from tokenprune.saving import resolve

SMALL = ("test_vit", "--stages", "2,4")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What MODEL can be, by kind."""
    root = tmp_path_factory.mktemp("models")
    hugging_face: Any = BY_NAME["transformers ViT classifier"].model()
    hugging_face.save_pretrained(root / "transformers")
    sparse: Any = BY_NAME["transformers ViT classifier"].sparsified()
    sparse.save_pretrained(root / "transformers-sparse")
    tokenprune.save_pretrained(BY_NAME["timm class token"].sparsified(), root / "saved", model_card=False)
    return {
        "a timm name": "test_vit",
        "a transformers folder": str(root / "transformers"),
        "a sparsified transformers folder": str(root / "transformers-sparse"),
        "a saved folder": str(root / "saved"),
    }


KINDS = ["a timm name", "a transformers folder", "a sparsified transformers folder", "a saved folder"]
STAGES = {"a timm name": ["--stages", "2,4"], "a transformers folder": ["--stages", "2,4"]}


@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_every_kind_of_model(kind: str, sources: dict[str, str]) -> None:
    options = STAGES.get(kind, [])
    reports = fields("flops", sources[kind], *options)["reports"]
    model = resolve.load_model(sources[kind])
    if options:
        tokenprune.sparsify(model, (2, 4), 0.7)
    size = tuple(reports[0]["input_size"])
    assert size == ((3, 160, 160) if kind == "a timm name" else (3, 48, 48))
    assert reports == [json.loads(tokenprune.flops(model, size).to_json())]
    assert reports[0]["keep_ratios"] == pytest.approx([0.7, 0.49] if options else [0.6, 0.36])
    result = run("flops", sources[kind], *options, "--by", "block")
    assert result.exit_code == 0 and "block 5" in result.stdout and "stage 1, keeps" in result.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_bench_of_every_kind_of_model(kind: str, sources: dict[str, str]) -> None:
    arguments = ["bench", sources[kind], *STAGES.get(kind, []), "-b", "2", "--pairs", "2", "--warmup", "0"]
    arguments += ["--device", "cpu"]
    told = fields(*arguments)
    assert [report["batch_size"] for report in told["reports"]] == [1, 2] and told["device"] == "cpu"
    for report in told["reports"]:
        assert report["speedup_over_gmac_ratio"] == pytest.approx(report["speedup"] / report["gmac_ratio"])
        assert report["gmac_ratio"] == pytest.approx(report["dense_gmacs"] / report["sparse_gmacs"])
        assert len(report["dense_seconds"]) == 2
        assert "too few" in report["doubt"]


def test_bench_tells_what_is_not_to_be_trusted() -> None:
    result = run("bench", *SMALL, "-b", "1", "--pairs", "2", "--warmup", "0", "--dtype", "bfloat16", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert "bfloat16, eager" in result.stdout and "? Not to be trusted at batch 1" in result.stdout


def test_bench_freezes_and_tells_the_limit() -> None:
    arguments = [*SMALL, "--freeze", "-k", "0.7", "-k", "0.5", "-b", "1", "--pairs", "2", "--device", "cpu"]
    told = fields("bench", *arguments)
    assert told["frozen"] and [report["limit"] > 0 for report in told["reports"]] == [True, True]
    assert [report["gmac_ratio"] for report in told["reports"]] == pytest.approx(
        [report["ratio"] for report in fields("flops", *SMALL, "-k", "0.7", "-k", "0.5")["reports"]]
    )
    refused = run("bench", *SMALL, "--freeze", "--pruned", "preserve", "-b", "1", "--pairs", "2", "--device", "cpu")
    assert refused.exit_code == 1 and "cannot be frozen" in refused.stderr


def test_bench_compares_ratios() -> None:
    arguments = ["bench", *SMALL, "-k", "0.9", "-k", "0.5", "-b", "1", "--pairs", "2", "--warmup", "0"]
    reports = fields(*arguments, "--device", "cpu")["reports"]
    counted = fields("flops", *SMALL, "-k", "0.9", "-k", "0.5")["reports"]
    assert [report["keep_ratios"] for report in reports] == [report["keep_ratios"] for report in counted]
    assert [report["gmac_ratio"] for report in reports] == pytest.approx([report["ratio"] for report in counted])


def test_bench_runs_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def throughputs(model: Any, size: Any, **options: Any) -> Any:
        batches, pairs = options["batch_sizes"], options["pairs"]
        seen.append((next(model.parameters()).dtype, size, batches, pairs, options["warmup"], options["runtime"]))
        assert options["limit"]
        return [
            tokenprune.ThroughputReport(
                input_size=size, batch_size=batch, keep_ratios=(0.7,), dense_seconds=(1.0,) * pairs,
                sparse_seconds=(1.0,) * pairs, dense_peak_bytes=3 << 20, sparse_peak_bytes=2 << 20,
            )
            for batch in batches
        ]  # fmt: skip

    monkeypatch.setattr("tokenprune.analysis.benchmark.throughputs", throughputs)
    result = run("bench", *SMALL, "--runtime", "compile", "--dtype", "float16", "-b", "4", "--pairs", "9",
                 "--warmup", "1", "--image-size", "96", "-k", "0.7", "-k", "0.5", "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert seen == [(torch.float16, (3, 96, 96), [1, 4], 9, 1, "compile")] * 2
    assert "float16, compile" in result.stdout and "3 → 2" in result.stdout and "?" not in result.stdout


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("a timm name", "pt2"),
        pytest.param("a transformers folder", "onnx", marks=pytest.mark.slow),
        ("a saved folder", "pt2"),
    ],
)
def test_export_of_every_kind_of_model(kind: str, suffix: str, sources: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / f"model.{suffix}"
    arguments = ["export", sources[kind], *STAGES.get(kind, []), "-k", "0.5", "-o", str(file)]
    told = fields(*arguments, *(["--no-pretrained"] if kind == "a timm name" else []))
    assert file.exists() and told["path"] == str(file) and told["model"] == sources[kind]
    assert told["batch_sizes"] == [1, 3, 8] and max(told["differences"]) < 1e-4
    assert told["input_size"] == ([3, 160, 160] if kind == "a timm name" else [3, 48, 48])
    if kind == "a saved folder":
        model = tokenprune.from_pretrained(sources[kind]).eval()
        model.tokenprune.keep_ratio = 0.5
        images = BY_NAME["timm class token"].images(5)
        with torch.no_grad():
            actual, expected = torch.export.load(file).module()(images), model(images)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["compile", "onnx", "pt2"])
def test_bench_of_every_runtime(runtime: str, sources: dict[str, str]) -> None:
    arguments = ("--runtime", runtime, "-b", "2", "--pairs", "2", "--device", "cpu")
    told = fields("bench", sources["a saved folder"], *arguments)
    assert told["runtime"] == runtime and [report["batch_size"] for report in told["reports"]] == [1, 2]
    assert all(report["runtime"] == runtime and report["limit"] > 0 for report in told["reports"])


def test_bench_without_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenprune.saving.export.find_spec", lambda name: None)
    result = run("bench", *SMALL, "--runtime", "onnx")
    assert result.exit_code == 2 and "--runtime onnx" in result.stderr and "tokenprune[export]" in result.stderr


def test_several_ratios_make_a_table_and_a_curve(tmp_path: Path) -> None:
    file = tmp_path / "curve.png"
    result = run("flops", *SMALL, "-k", "0.9", "-k", "0.5", "-k", "0.5,0.2", "--plot", str(file))
    assert result.exit_code == 0, result.stderr
    assert all(row in result.stdout for row in ("90.0% → 81.0%", "50.0% → 25.0%", "50.0% → 20.0%"))
    assert file.read_bytes().startswith(b"\x89PNG")


def test_the_curve_shows_what_was_counted() -> None:
    from tokenprune.analysis.plotting import flops_curve

    model = BY_NAME["timm class token"].sparsified()
    reports = []
    for ratio in (0.9, 0.5, 0.7):
        model.tokenprune.keep_ratio = ratio
        reports.append(tokenprune.flops(model, (3, 48, 48)))
    axes = flops_curve(reports, title="DeiT").axes[0]
    assert list(axes.lines[0].get_xdata()) == pytest.approx([0.25, 0.49, 0.81])
    assert list(axes.lines[0].get_ydata()) == [reports[index].sparse_gmacs for index in (1, 2, 0)]
    assert set(axes.lines[1].get_ydata()) == {reports[0].dense_gmacs} and axes.get_title() == "DeiT"


def test_another_reduction() -> None:
    counted = {
        pruned: fields("flops", *SMALL, "--pruned", pruned, "-k", "0.5")["reports"][0]["sparse"]
        for pruned in ("drop", "preserve", "fuse", "merge")
    }
    assert len(set(counted.values())) == 4 and min(counted.values()) == counted["drop"]


def test_another_image_size_and_scorer() -> None:
    report = fields("flops", *SMALL, "--image-size", "96x160", "--scorer", "random", "-k", "0.5")["reports"][0]
    assert report["input_size"] == [3, 96, 160] and report["stages"] == [0, 0]
    model = tokenprune.sparsify(timm.create_model("test_vit", img_size=(96, 160)), (2, 4), 0.5, scorer="random")
    assert report == json.loads(tokenprune.flops(model, (3, 96, 160)).to_json())


def test_a_saved_model_keeps_its_plan_but_for_the_ratio(sources: dict[str, str]) -> None:
    saved = sources["a saved folder"]
    assert fields("flops", saved, "-k", "0.5")["reports"][0]["keep_ratios"] == [0.5, 0.25]
    assert run("flops", saved, "--stages", "2,4").exit_code == 0
    for option in (["--stages", "1,3"], ["--scorer", "random"], ["--pruned", "merge"]):
        result = run("flops", saved, *option)
        assert result.exit_code == 2 and "the saved model" in result.stderr


def test_models_lists_what_is_proved_and_installed() -> None:
    told = fields("models")
    by_name = {library["name"]: library for library in told["libraries"]}
    assert by_name["timm"]["installed"] == timm.__version__ and by_name["transformers"]["proved_with"]
    assert len(told["models"]) == len(tokenprune.supported()) == sum(one["num_models"] for one in told["libraries"])
    result = run("models")
    assert result.exit_code == 0 and timm.__version__ in result.stdout
    result = run("models", "torchvision")
    assert result.exit_code == 0 and "vit_b_16" in result.stdout and "beit" not in result.stdout


@pytest.mark.parametrize(
    "command", [[], ["flops"], ["bench"], ["models"], ["export"], ["show"], ["report"], ["convert"]]
)
def test_help(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0 and "Usage: " in result.stdout
    if command:
        assert "In Python: tokenprune." in result.stdout
    else:
        assert all(name in result.stdout for name in ("flops", "bench", "models", "Exit codes"))
        assert run().stdout.split() == result.stdout.split()
        assert run("--version").stdout == f"{tokenprune.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flops"], "Missing argument"),
        (["nonsense"], "No such command 'nonsense'"),
        (["flops", "test_vit", "--nonsense"], "No such option"),
        (["flops", "test_vit", "-k", "1.5"], "expected numbers above 0 and up to 1"),
        (["flops", "test_vit", "-k", "half"], "expected a number such as 0.7"),
        (["flops", "test_vit", "-k", "0.5,0.4"], "and 3 stage(s) do not match"),
        (["flops", "test_vit", "--stages", "two"], "expected block numbers such as 3,6,9"),
        (["flops", "test_vit", "--stages", "2,40"], "stage 40 is out of range"),
        (["flops", "test_vit", "--image-size", "big"], "expected pixels such as 224"),
        (["flops", "test_vit", "--by", "colour"], "--by"),
        (["flops", "test_vit", "--scorer", "oracle"], "scorer='oracle' is unknown"),
        (["flops", "test_vit", "--pruned", "melt"], "pruned='melt' is unknown"),
        (["flops", "test_vit", "--plot", "x.png"], "give --keep-ratio several times"),
        (["flops", *SMALL, "-k", "0.9", "-k", "0.5", "--plot", "curve.nonsense"], "--plot curve.nonsense"),
        (["bench", "test_vit", "--device", "toaster"], "--device toaster"),
        (["bench", "test_vit", "--dtype", "int3"], "--dtype"),
        (["bench", "test_vit", "--pairs", "1"], "--pairs"),
        (["export", "test_vit"], "Missing option '--output'"),
        (["export", "test_vit", "-o", "{empty}/model.pth"], "the name must end with .onnx or .pt2"),
        (["export", "test_vit", "-o", "{empty}/no/model.pt2"], "there is no folder"),
        (["export", "test_vit", "-o", "{empty}/model.pt2", "-k", "2"], "expected numbers above 0 and up to 1"),
        (["export", "nobody/nothing", "-o", "{empty}/model.pt2"], "no model 'nobody/nothing'"),
        (["models", "keras"], "'keras' is no library with an adapter"),
        (["flops", "vit_tny_patch16_224"], "Did you mean vit_tiny_patch16_224"),
        (["flops", "torchvision:test_vit"], "torchvision: no model of that name"),
        (["flops", "nobody/nothing"], "no model 'nobody/nothing'"),
        (["flops", "{empty}"], "the folder has no tokenprune.json"),
    ],
)
def test_bad_arguments_end_in_one_line_and_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run(*(argument.replace("{empty}", str(tmp_path)) for argument in arguments))
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_what_fails_ends_with_code_1(tmp_path: Path, sources: dict[str, str]) -> None:
    result = run("flops", "test_resnet")
    assert result.exit_code == 1 and "has no" in result.stderr and "Traceback" not in result.stderr
    result = run("flops", "test_vit", "--stages", "2", "--image-size", "7")
    assert result.exit_code == 1 and "Traceback" not in result.stderr
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "tokenprune.json").write_text("{")
    result = run("flops", str(damaged))
    assert result.exit_code == 1 and "it is not JSON" in result.stderr


def test_an_error_that_nobody_foresaw_has_its_traceback_on_demand(
    sources: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> Any:
        raise ZeroDivisionError("nobody foresaw it")

    monkeypatch.setattr("tokenprune.analysis.flop_counter.flops", fail)
    result = run("flops", sources["a saved folder"])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and "--debug" in result.stderr
    result = run("--debug", "flops", sources["a saved folder"])
    assert isinstance(result.exception, ZeroDivisionError)


def test_names_of_every_library_and_where_they_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(resolve.load_model("vit_b_16")).__module__.startswith("torchvision")
    assert resolve.load_model("timm:test_vit", image_size=(96, 96)).patch_embed.img_size == (96, 96)
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=5), tmp_path / "by-timm", safe_serialization=True)
    loaded = resolve.load_model(str(tmp_path / "by-timm"), pretrained=True)
    assert type(loaded).__name__ == "VisionTransformer" and loaded.num_classes == 5
    with pytest.raises(tokenprune.UnknownModelError, match=r"transformers: neither a folder nor a Hub id.*no folder"):
        resolve.load_model("nothing")
    # A folder wins over a name.
    monkeypatch.chdir(tmp_path)
    tokenprune.save_pretrained(BY_NAME["torchvision"].sparsified(), tmp_path / "test_vit", model_card=False)
    assert type(resolve.load_model("test_vit")).__module__.startswith("torchvision")


def test_trained_weights_come_on_demand(sources: dict[str, str]) -> None:
    folder = sources["a transformers folder"]
    expected = BY_NAME["transformers ViT classifier"].model().state_dict()
    trained = resolve.load_model(folder, pretrained=True).state_dict()
    assert all(torch.equal(expected[name], trained[name]) for name in expected)
    with pytest.raises(tokenprune.UnsupportedModelError, match="another image size"):
        resolve.load_model(folder, pretrained=True, image_size=(64, 64))
    resized: Any = resolve.load_model(folder, image_size=(64, 64))
    assert resized.config.image_size == 64


def test_a_saved_model_on_the_hub(monkeypatch: pytest.MonkeyPatch, sources: dict[str, str]) -> None:
    saved = Path(sources["a saved folder"])
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo_id, name: str(saved / name))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo_id, **options: str(saved))
    assert resolve.load_model("me/pruned").tokenprune.keep_ratio == pytest.approx((0.6, 0.36))


def test_what_libraries_print_does_not_get_into_the_json(
    monkeypatch: pytest.MonkeyPatch, sources: dict[str, str]
) -> None:
    load = resolve.load_model

    def noisy(name: str, **options: Any) -> Any:
        sys.stdout.write("downloading …")
        return load(name, **options)

    monkeypatch.setattr(resolve, "load_model", noisy)
    result = run("flops", sources["a saved folder"], "--json")
    assert json.loads(result.stdout)["reports"] and "downloading" in result.stderr


def test_as_a_process_json_is_all_there_is_on_stdout(sources: dict[str, str]) -> None:
    command = [sys.executable, "-m", "tokenprune", "flops", sources["a saved folder"], "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == sources["a saved folder"]
    done = subprocess.run([*command[:3], "flops"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == "Error: Missing argument 'MODEL'.\n"


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("photos") / "flower.png"
    Image.fromarray(load_sample_images().images[1]).save(file)
    return str(file)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_show_of_every_kind_of_model(
    kind: str, suffix: str, sources: dict[str, str], photo: str, tmp_path: Path
) -> None:
    file = tmp_path / f"kept{suffix}"
    told = fields("show", sources[kind], photo, photo, "-o", str(file), "--no-pretrained", *STAGES.get(kind, []))
    ratio = 0.7 if kind in STAGES else 0.6
    total = told["num_patches"]
    assert told["stages"] == [2, 4] and told["num_kept"] == [int(total * ratio + 1e-9), int(total * ratio**2 + 1e-9)]
    assert told["grid"][0] * told["grid"][1] == total and told["images"] == [photo, photo]
    assert told["scorer"] == ("cls_attention" if kind in STAGES else "predictor")
    with Image.open(file) as picture:
        assert getattr(picture, "n_frames", 1) == (3 if suffix == ".gif" else 1)


def test_show_takes_options_and_prunes_by_attention(photo: str, tmp_path: Path) -> None:
    file = tmp_path / "kept.svg"
    result = run("show", *SMALL, photo, "--no-pretrained", "-o", str(file), "-k", "0.5,0.2", "--no-scores",
                 "--title", "a < b", "--image-size", "96")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "36 → 18 → 7" in result.stdout.replace("\n", " ")
    assert file.read_text().startswith("<?xml")


@pytest.mark.parametrize("kind", KINDS)
def test_report_of_every_kind_of_model(kind: str, sources: dict[str, str], photo: str, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    told = fields("report", sources[kind], "-i", photo, "-o", str(file), "--no-pretrained", "--bench", "-b", "1",
                  "--pairs", "2", *STAGES.get(kind, []))  # fmt: skip
    page = file.read_text(encoding="utf-8")
    assert told == {"output": str(file), "bytes": len(page.encode()), "runs": [], "has_model": True}
    assert "flower.png after stage 2" in page and "images/s" in page and "Block by block" in page
    assert f"tokenprune report {sources[kind]} -i" in page
    assert ("ClassAttention" if kind in STAGES else "Predictor") in page


def test_report_of_runs(tmp_path: Path, photo: str) -> None:
    file = tmp_path / "report.html"
    sparse = write_run(tmp_path / "sparse")
    tokenprune.save_pretrained(BY_NAME["timm class token"].sparsified(), sparse, model_card=False)
    told = fields("report", str(sparse), "-o", str(file), "-i", photo)
    page = file.read_text(encoding="utf-8")
    assert told["has_model"] and told["runs"] == [str(sparse)]
    assert "flower.png after stage 1" in page and "75.00 %" in page and "Kept in training" in page
    dense = write_run(tmp_path / "dense", sparse=False)
    result = run("report", str(dense), "-o", str(file))
    assert result.exit_code == 0 and "of the run alone" in result.stdout
    assert fields("report", str(dense), str(sparse), "-o", str(file))["has_model"] is False
    assert "Accuracy and cost" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["show", "test_vit"], "Missing argument"),
        (["show", "test_vit", "nowhere.png"], "does not exist"),
        (["show", *SMALL, "{text}", "--no-pretrained"], "no picture of a kind"),
        (["show", *SMALL, "{photo}", "--no-pretrained", "-o", "kept.docx"], "docx"),
        (["show", *SMALL, "{photo}", "-o", "nowhere/kept.png"], "no folder nowhere"),
        (["show", *SMALL, "{photo}", "-k", "2"], "above 0 and up to 1"),
        (["show", *SMALL, "{photo}", "--scorer", "vibes", "--no-pretrained"], "vibes"),
        (["show", "no_such_model", "{photo}"], "no_such_model"),
        (["report"], "Missing argument"),
        (["report", "test_vit", "test_vit2"], "several models"),
        (["report", "{run}", "test_vit"], "hold no results.json"),
        (["report", "{run}", "{run}", "-i", "{photo}"], "--image: for one run"),
        (["report", *SMALL, "-o", "nowhere/report.html"], "no folder nowhere"),
        (["report", "{damaged}"], "damaged"),
        (["report", "{run}", "--bench"], "Error"),
    ],
)
def test_bad_arguments_of_pictures_and_reports_end_in_one_line(
    arguments: list[str], message: str, photo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("text")
    write_run(tmp_path / "run", sparse=False)
    write_run(tmp_path / "damaged")
    (tmp_path / "damaged" / "results.json").write_text("{")
    named = {"text": "text.png", "photo": photo, "run": "run", "damaged": "damaged"}
    result = run(*(argument.format(**named) for argument in arguments))
    assert result.exit_code == 2 and message in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and "Traceback" not in result.stderr
