"""Options of the commands, right and wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """Some arguments of a command line.

    Attributes:
        arguments: What stands there. ``{…}`` are files: see the tests.
        valid: Whether the command must take them (``True``), must end with code 2 (``False``), or may do either.
    """

    arguments: tuple[str, ...]
    valid: bool | None


def _option(name: str, good: Sequence[str], bad: Sequence[str], either: Sequence[str] = ()) -> list[Option]:
    return [
        *(Option((name, value), True) for value in good),
        *(Option((name, value), False) for value in bad),
        *(Option((name, value), None) for value in either),
    ]


_RATIOS = _option(
    "-k",
    ["0.5", "1", "1.0", " 0.5 ", "5e-1", "0.7", "0.8,0.5", "0.5,0.5"],
    ["half", "", "0", "-1", "-0.5", "1.5", "nan", "inf", "-inf", "0.5;0.4", "0.4,0.5", "1e400", ",", "0.5,",
     "0.5,0.4,0.3", "1e-400", "0x1", "½", "0.5 0.4", "1" * 400],
)  # fmt: skip
_STAGES = _option("--stages", ["1,3", " 1, 3 "], ["two", "", "-1,3", "1,3,9", "3,1", "1,1", "1.5", "1,,3", "1;3",
                                                  "9" * 30, "9" * 5000])  # fmt: skip
_SIZES = _option("--image-size", ["32", "32x32", "32X32"],
                 ["", "0", "-32", "big", "32x", "x32", "x", "32x32x32", "33", "64", "8", "32x64", "3.2", "32,32", "²",
                  "0x32"],
                 ["٣٢"])  # fmt: skip
_REDUCTION_NAMES = _option("--pruned", ["drop"], ["burn", "", "Drop", "drop,merge", "fuse"])
_SCORER_NAMES = _option("--scorer", ["predictor"], ["oracle", "", "Predictor", "random"])
_ODD_ARGUMENTS = [Option((argument,), False) for argument in ("--nonsense", "-q", "--stages", "--json=3", "-k")]
_COMMON = [*_RATIOS, *_RATIOS, *_STAGES, *_SIZES, *_SCORER_NAMES, *_REDUCTION_NAMES, *_ODD_ARGUMENTS]
_BATCHES = [
    *_option("-b", ["1", "2"], ["0", "-1", "two", "1.5", ""]),
    *_option("--pairs", ["2"], ["1", "0", "-3", "many", "2.5"]),
]
_TITLES = _option("--title", ["", "a < b & c", "ü" * 300, "$x_$", "\\frac{", "$\\frac{$", "{x}"], [])
COMMANDS: dict[str, list[Option]] = {
    "flops": [*_COMMON, *_option("--by", ["total", "block"], ["", "colour", "TOTAL "]),
              *_option("--plot", [], ["{out}/x.png", "{out}", ""])],
    "bench": [*_COMMON, *_BATCHES, *_option("--warmup", ["0"], ["-1", "no"]),
              *_option("--dtype", ["float32", "bfloat16"], ["int8", "float", ""]),
              *_option("--runtime", ["eager"], ["tensorrt", "", "Eager"]),
              *_option("--device", ["cpu"], ["toaster", "", "meta", "cpu:x", "-1", "cuda:99"])],
    "show": [*_COMMON, *_TITLES, *_option("--seconds", ["0.02", "3"], ["0", "-1", "nan", "soon"]),
             *_option("-o", ["{out}/a.png", "{out}/a.gif", "{out}/a.svg"],
                      ["{out}/no/a.png", "{out}/a.docx", "{out}", "", "{photo}/a.png"]),
             Option(("--no-scores",), True), Option(("--scores",), True)],
    "report": [*_COMMON, *_TITLES, *_option("-i", ["{photo}"], ["{no}", "{text}", "{out}", "{empty}", ""]),
               *_option("-o", ["{out}/a.html", "{out}/a"], ["{out}/no/a.html", "{out}", "{photo}/a.html"])],
    "models": [Option(("timm",), True), Option(("torchvision",), True), Option(("keras",), False), Option(("",), False),
               Option(("timm", "timm"), False), Option(("--nonsense",), False)],
    "convert": [*_option("-k", ["0.5", "1", "0.9,0.5,0.2"], ["0", "2", "nan", "half", "0.5,0.4", ""]),
                *_option("--stages", ["1,2,3", "0,1,3"], ["", "9", "3,2,1", "a", "1,2"], ["1"]),
                *_option("--num-heads", ["1", "4"], ["0", "-1", "many"], ["3", "7", "1000000"]),
                *_option("-o", ["{out}/b", "{out}/b/c"], ["{photo}", "{photo}/b"]), Option(("-o",), False)],
    "export": [*_COMMON, *_option("-o", [],
               ["{out}/a.pth", "{out}/no/a.pt2", "{out}", "", "{photo}/a.pt2", "{out}/.pt2"])],
}  # fmt: skip
"""By command the options that are drawn from; the model is saved, with stages in front of blocks 1 and 3."""
MODELS = [
    *(Option(("{saved}",), True) for _ in range(12)),
    *(Option((name,), False) for name in ("nothing", "", "{empty}", "{out}", "timm:nothing", "a/b", "{out}/no", ":",
                                          "timm:", "keras:x", "x" * 300, "a/b/c", "\n", "~", "../..", "{photo}",
                                          "timm:{saved}")),
    *(Option((name,), None) for name in ("{damaged}", "{no_weights}", "{no_manifest}", "test_resnet", "{dense}")),
]  # fmt: skip
