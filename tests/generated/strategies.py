"""What is generated: valid and invalid inputs of every kind, mixed."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.generated.outcomes import Users
from tokenprune import Adaptation, Candidates, Reduced, Reduction, Scorer, Setting, Split, TokenTable

Test = TypeVar("Test", bound=Callable[..., Any])


def share(percent: int) -> Callable[[Test], Test]:
    """Have a property tried with so much of what the profile has for an area."""
    return settings(max_examples=settings().max_examples * percent // 100)


class Given(NamedTuple):
    """An input, and whether it must work (``True``), must be refused (``False``) or may end either way (``None``)."""

    value: Any
    valid: bool | None


def _given(strategy: st.SearchStrategy[Any], valid: bool | None) -> st.SearchStrategy[Given]:
    return strategy.map(lambda value: Given(value, valid))


def mixed(good: st.SearchStrategy[Any], bad: st.SearchStrategy[Any]) -> st.SearchStrategy[Given]:
    """As often what must work as what must be refused."""
    return st.one_of(_given(good, True), _given(bad, False))


class Odd:
    """Nothing that anybody expects."""

    def __repr__(self) -> str:
        return "Odd()"


# Neither numbers nor sequences of them.
ODD = st.sampled_from([None, "half", "", b"3", {}, {"a": 1}, Odd(), Odd, float, 1j, [[]], [None], ["0.5"]])
HUGE = st.sampled_from([10**400, -(10**400), Fraction(10**400, 3), 2**63])
FLOATS = st.floats(allow_nan=True, allow_infinity=True)

# Numbers

IN_RANGE = st.floats(min_value=0.05, max_value=1.0)
_RATIO_TYPES: tuple[Callable[[float], Any], ...] = (float, np.float64, np.float32, lambda ratio: Fraction(ratio))
OUT_OF_RANGE = st.one_of(
    FLOATS.filter(lambda ratio: not 0 < ratio <= 1),
    st.integers(max_value=0),
    st.integers(min_value=2),
    HUGE,
    st.sampled_from([True, False, Decimal("0.5"), np.float32("nan"), torch.tensor(0.5), Fraction(1, 10**400)]),
)


@st.composite
def good_ratio(draw: st.DrawFn) -> Any:
    """One number, of any type that is one."""
    ratio = draw(st.sampled_from(_RATIO_TYPES))(draw(IN_RANGE))
    return draw(st.sampled_from([ratio, ratio, 1, 1.0]))


@st.composite
def good_ratios(draw: st.DrawFn, number: int) -> Any:
    """One number, or one for each of so many stages that never rise."""
    if draw(st.booleans()):
        return draw(good_ratio())
    ratios = draw(st.lists(good_ratio(), min_size=number, max_size=number))
    return draw(st.sampled_from([list, tuple, np.array]))(sorted(ratios, key=float, reverse=True))


@st.composite
def bad_ratios(draw: st.DrawFn, number: int) -> Any:
    """What cannot be the keep ratios of so many stages."""
    ratios = sorted(draw(st.lists(IN_RANGE, min_size=number, max_size=number)), reverse=True)
    kind = draw(st.sampled_from(["odd", "number", "one of them", "too many", "too few", "rising", "tensor"]))
    if kind == "odd":
        return draw(ODD)
    if kind == "number":
        return draw(OUT_OF_RANGE)
    if kind == "one of them":
        ratios[draw(st.integers(0, number - 1))] = draw(st.one_of(OUT_OF_RANGE, ODD))
        return ratios
    if kind == "too few":
        return ratios[1:]
    if kind == "rising" and number > 1 and ratios[0] > ratios[-1]:
        return ratios[::-1]
    if kind == "tensor":
        return torch.tensor(ratios)
    return (*ratios, ratios[-1])


# Plans


@st.composite
def good_stages(draw: st.DrawFn, depth: int) -> Any:
    """Ascending block indices."""
    stages = sorted(draw(st.sets(st.integers(0, depth - 1), min_size=1, max_size=4)))
    return draw(st.sampled_from([tuple, list, np.array, iter]))(stages)


@st.composite
def bad_stages(draw: st.DrawFn, depth: int) -> Any:
    """What cannot be the stages of a model of that depth."""
    stages = sorted(draw(st.sets(st.integers(0, depth - 1), min_size=1, max_size=4)))
    kind = draw(st.sampled_from(["odd", "number", "one of them", "none", "descending", "twice", "out of range"]))
    if kind == "odd":
        return draw(ODD.filter(lambda value: value is not None))
    if kind == "number":
        return draw(st.one_of(st.integers(), FLOATS, HUGE))
    if kind == "one of them":
        odd = st.one_of(ODD, FLOATS, st.sampled_from([True, -1, 1.0, np.float64(2), torch.tensor(1), Decimal(1)]))
        stages[draw(st.integers(0, len(stages) - 1))] = draw(odd)
        return stages
    if kind == "descending" and len(stages) > 1:
        return stages[::-1]
    if kind == "twice":
        return sorted([*stages, stages[0]])
    if kind == "out of range":
        return [*stages, draw(st.one_of(st.integers(min_value=depth), HUGE.filter(lambda one: one != 2**63)))]
    return draw(st.sampled_from([(), [], set()]))


def is_plan(stages: Any, ratios: Any) -> bool:
    """Whether two lists make a plan, said in other words than the library's."""
    numbers = all(type(one) is int and one >= 0 for one in stages)
    inside = all(type(one) in (int, float) and math.isfinite(one) and 0 < one <= 1 for one in ratios)
    if not (numbers and inside and stages and len(stages) == len(ratios)):
        return False
    return stages == sorted(set(stages)) and ratios == sorted(ratios, reverse=True)


# JSON

SMALL_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 70), FLOATS, st.text(max_size=4), st.just(10**400)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=4,
)
NO_JSON = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", "{", "[" * 20_000, '{"version": 1', "1" * 5000, "\x00", "\ud800", '{"a": 1}{"a": 1}', "nul"]),
)


def paths_of(fields: Any) -> list[tuple[Any, ...]]:
    """Where there is something in a tree of JSON."""
    inner = fields.items() if isinstance(fields, dict) else enumerate(fields) if isinstance(fields, list) else ()
    return [(), *((key, *path) for key, value in inner for path in paths_of(value))]


@st.composite
def damaged_json(draw: st.DrawFn, fields: Any) -> Any:
    """A tree of JSON in which one or two places hold something else, or nothing. Changes ``fields``."""
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(paths_of(fields)))
        if not path:
            if draw(st.integers(0, 4)) == 0:
                return draw(SMALL_JSON)
            continue
        inner = fields
        for key in path[:-1]:
            inner = inner[key]
        if draw(st.integers(0, 3)) == 0:
            del inner[path[-1]]
        else:
            inner[path[-1]] = draw(SMALL_JSON)
    return fields


# Scorers


class Spread(Scorer):
    """Scores far apart, other ones for every image, the same for a patch in every execution."""

    def forward(self, candidates: Candidates) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        scores = torch.randn(len(candidates.patches), candidates.num_patches, generator=generator)
        return candidates.at_candidates(self.changed(scores))

    def changed(self, scores: Tensor) -> Tensor:
        return scores


class Bent(Spread):
    """`Spread`, of which something is done to the scores."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def changed(self, scores: Tensor) -> Any:
        return self.change(scores)


class Learned(Spread):
    """`Spread` with weights, whose decisions are sampled in training."""

    probabilistic = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Linear(width, 1)

    def forward(self, candidates: Candidates) -> Tensor:
        return self.weight(candidates.patches).squeeze(-1) + super().forward(candidates)


class Attentive(Spread):
    """`Spread` that looks at attention."""

    needs_attention = True

    def forward(self, candidates: Candidates) -> Tensor:
        assert candidates.attention is not None and candidates.attention.shape == candidates.patches.shape[:2]
        return super().forward(candidates) + candidates.attention


class Raising(Scorer):
    """One that fails."""

    def forward(self, candidates: Candidates) -> Tensor:
        raise Users("out of scores")


class Returning(Scorer):
    """One that gives whatever it is told to make of the scores that it should give."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, candidates: Candidates) -> Any:
        return self.make(candidates.patches.mean(dim=2))


def _raise(*args: Any) -> Any:
    raise Users("not today")


def _returning(make: Callable[[Tensor], Any]) -> Callable[[Any], Scorer]:
    return lambda context: Returning(make)


def _extreme(number: float, low: float = 0.0) -> Callable[[Tensor], Tensor]:
    return lambda scores: scores.masked_fill(scores > low, number)


GOOD_SCORERS: dict[str, Any] = {
    "predictor": "predictor",
    "cls_attention": "cls_attention",
    "random": "random",
    "static": "static",
    "spread": lambda context: Spread(),
    "learned": lambda context: Learned(context.embed_dim),
    "attentive": lambda context: Attentive(),
    "double precision": lambda context: Bent(Tensor.double),
    "half precision": lambda context: Bent(Tensor.bfloat16),
    "whole numbers": lambda context: Bent(lambda scores: (scores * 1e6).long()),
    "yes and no": lambda context: Bent(lambda scores: scores > 0),
    "all alike": lambda context: Bent(torch.zeros_like),
    "infinite": lambda context: Bent(_extreme(math.inf)),
    "minus infinity for most": lambda context: Bent(_extreme(-math.inf, low=-1.0)),
    "minus infinity for all": lambda context: Bent(_extreme(-math.inf, low=-math.inf)),
    "the largest numbers": lambda context: Bent(lambda scores: scores * 1e38),
}
# What is refused when the model is sparsified.
BAD_SCORERS = st.one_of(
    ODD.filter(lambda value: value is not float and value is not Odd),
    st.text(max_size=6).filter(lambda name: name not in GOOD_SCORERS),
    st.sampled_from([
        Spread(), Spread, float, Odd, _raise, lambda: Spread(), lambda context: None, lambda context: Spread,
        lambda context: nn.Identity(), lambda context: "static", lambda context: [Spread()], print, nn.Linear(2, 2),
        lambda context: context.nonsense, 7, 0.5, True,
    ]),
)  # fmt: skip
# What is refused when the model runs, if a stage asks.
FAILING_SCORERS: dict[str, Any] = {
    "raises": lambda context: Raising(),
    "no forward": lambda context: Scorer(),
    **{
        name: _returning(make)
        for name, make in {
            "nothing": lambda scores: None,
            "a number": lambda scores: 0.5,
            "a list": lambda scores: scores.tolist(),
            "a tuple": lambda scores: (scores, scores),
            "an array": lambda scores: scores.detach().numpy(),
            "for all channels": lambda scores: scores.unsqueeze(2),
            "for one image": lambda scores: scores[:1],
            "one too few": lambda scores: scores[:, 1:],
            "one too many": lambda scores: torch.cat([scores, scores[:, :1]], dim=1),
            "turned around": lambda scores: scores.T,
            "no dimension": lambda scores: scores.mean(),
            "complex numbers": lambda scores: scores.to(torch.complex64),
        }.items()
    },
}


# Reductions


class Told(Reduction):
    """One that makes of a split whatever it is told to."""

    def __init__(self, make: Callable[[Split], Any], *, restores: bool = False, num_summary: int = 0) -> None:
        super().__init__()
        self.make, self.restores, self.num_summary = make, restores, num_summary

    def forward(self, split: Split) -> Any:
        return self.make(split)


class Weighted(Reduction):
    """One with weights of its own, and two summary tokens."""

    num_summary = 2

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Linear(width, width)

    def forward(self, split: Split) -> Reduced:
        pruned = split.pruned.unsqueeze(-1)
        mean = (split.patches * pruned).sum(dim=1, keepdim=True) / pruned.sum(dim=1, keepdim=True).clamp(min=1)
        summary = self.weight(mean)
        return Reduced(split.patches, summary=torch.cat([summary, -summary], dim=1))


def _first_kept(split: Split) -> Tensor:
    """For each pruned token the first one that is kept."""
    places = torch.arange(split.keep.shape[1]).expand_as(split.keep)
    first = split.keep.detach().argmax(dim=1, keepdim=True).expand_as(places)
    return torch.where(split.pruned.detach() > 0, first, places)


def _told(make: Callable[[Split], Any], **options: Any) -> Callable[[Any], Reduction]:
    return lambda context: Told(make, **options)


GOOD_REDUCTIONS: dict[str, Any] = {
    **{name: name for name in ("drop", "preserve", "fuse", "merge", "fuse_preserve", "merge_preserve")},
    "weighted": lambda context: Weighted(context.embed_dim),
    "as they are": _told(lambda split: Reduced(split.patches)),
    "brighter": _told(lambda split: Reduced(split.patches * (1 + split.pruned.amax(1)[:, None, None] / 2))),
    "in double precision": _told(
        lambda split: Reduced(split.patches.double(), summary=split.patches[:, :1].double() * 0), num_summary=1
    ),
    "hosts": _told(lambda split: Reduced(split.patches, hosts=_first_kept(split)), restores=True),
    "hosts that nobody needs": _told(lambda split: Reduced(split.patches, hosts=_first_kept(split))),
    "a summary, restored": _told(
        lambda split: Reduced(split.patches, summary=split.patches.new_ones(len(split.patches), 1, 1).expand(
            -1, -1, split.patches.shape[2])), restores=True, num_summary=1,
    ),
}  # fmt: skip
SUMMING = frozenset({"fuse", "fuse_preserve", "weighted", "in double precision", "a summary, restored"})
"""Those with tokens that have no place in the image."""
BAD_REDUCTIONS = st.one_of(
    ODD,
    st.text(max_size=6).filter(lambda name: name not in GOOD_REDUCTIONS),
    st.sampled_from([
        Reduction(), Weighted, float, Odd, _raise, lambda: Reduction(), lambda context: None, lambda context: Reduction,
        lambda context: nn.Identity(), lambda context: "drop", lambda context: Spread(), print, nn.Linear(2, 2), True,
    ]),
)  # fmt: skip
FAILING_REDUCTIONS: dict[str, Any] = {
    "raises": _told(_raise),
    "no forward": lambda context: Reduction(),
    **{
        name: _told(make, num_summary=1)
        for name, make in {
            "nothing": lambda split: None,
            "tokens alone": lambda split: split.patches,
            "a tuple": lambda split: (split.patches, None, None),
            "no patches": lambda split: Reduced(None),
            "patches of another width": lambda split: Reduced(split.patches[..., 1:]),
            "one patch too few": lambda split: Reduced(split.patches[:, 1:]),
            "one image": lambda split: Reduced(split.patches[:1]),
            "patches without channels": lambda split: Reduced(split.patches[..., 0]),
            "a summary of another width": lambda split: Reduced(split.patches, summary=split.patches[:, :1, 1:]),
            "a summary without tokens": lambda split: Reduced(split.patches, summary=split.patches[:, 0]),
            "a summary of one image": lambda split: Reduced(split.patches, summary=split.patches[:1, :1]),
            "summaries that were not announced": lambda split: Reduced(split.patches, summary=split.patches[:, :2]),
            "no summary": lambda split: Reduced(split.patches, summary=split.patches[:, :0]),
            "a summary that is a list": lambda split: Reduced(split.patches, summary=[split.patches]),
        }.items()
    },
    **{
        name: _told(make, restores=True)
        for name, make in {
            "a summary that was not announced": lambda split: Reduced(split.patches, summary=split.patches[:, :1]),
            "hosts that are numbers": lambda split: Reduced(split.patches, hosts=split.keep),
            "hosts of some": lambda split: Reduced(split.patches, hosts=_first_kept(split)[:, 1:]),
            "hosts of one image": lambda split: Reduced(split.patches, hosts=_first_kept(split)[0]),
            "hosts that are a list": lambda split: Reduced(split.patches, hosts=_first_kept(split).tolist()),
        }.items()
    },
}


# Executions

_BROKEN_IMAGES = st.sampled_from([
    None, [], "picture", torch.zeros(2, 3, 32), torch.zeros(2, 5, 32, 32), torch.zeros(2, 3, 3, 3), torch.zeros(3),
])  # fmt: skip
STEPS = st.one_of(
    st.tuples(st.just("execution"), mixed(st.sampled_from(["mask", "gather", "auto"]), st.one_of(ODD, st.text()))),
    st.tuples(st.sampled_from(["ratio", "train", "eval", "dense"]), st.none()),
    st.tuples(st.sampled_from(["run", "copy"]), st.booleans()),
    st.tuples(st.just("broken"), _BROKEN_IMAGES),
)
"""What is done with a sparsified model: the name of a step, and what it is done with."""


@st.composite
def _scores(draw: st.DrawFn) -> Tensor:
    batch, number = draw(st.integers(1, 3)), draw(st.integers(1, 30))
    special = [0.0, 1.0, math.inf, -math.inf, math.nan, 3.4e38, -3.4e38, 1e-45]
    numbers = st.one_of(st.floats(width=32), st.sampled_from(special))
    rows = st.lists(numbers, min_size=number, max_size=number)
    return torch.tensor(draw(st.lists(rows, min_size=batch, max_size=batch)))


SCORES = _scores()
"""(B, n) of any numbers that there are."""


# Descriptions of timm's Vision Transformers

Field = Callable[[Any], Any]
"""Of a model what a field of its description is to hold."""


def _always(*values: Any) -> list[Field]:
    return [partial(_itself, value) for value in values]


def _itself(value: Any, model: Any) -> Any:
    return value


def _attentions(model: Any) -> list[list[nn.Module]]:
    return [[block.attn] for block in model.blocks]


def _norm(model: Any) -> nn.Module:
    norm: nn.Module = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
    return norm


_NO_SIDES = (8, 8.0, "8", "88", (8,), (8, 8, 8), (0, 8), (8, -8), ("8", "8"), (8.0, 8.0), (None, 8), {8: 8}, True)
TRUE_FIELDS: dict[str, list[Field]] = {
    "blocks": [lambda model: model.blocks, lambda model: [*model.blocks], lambda model: (*model.blocks,)],
    "num_prefix_tokens": [lambda model: model.num_prefix_tokens, lambda model: np.int64(model.num_prefix_tokens)],
    "embed_dim": [lambda model: model.embed_dim, lambda model: np.int32(model.embed_dim)],
    "num_suffix_tokens": _always(0),
    "class_token": _always(True, False),
    "patch_size": _always(None, (8, 8), [8, 8]),
    "grid_size": [lambda model: model.patch_embed.grid_size, lambda model: None],
    "final_norm": [_norm, lambda model: None],
    "downstream": _always("pooled", "all tokens"),
    "attentions": [lambda model: None, _attentions, lambda model: tuple(map(tuple, _attentions(model)))],
    "token_inputs": _always({}, {"attn_mask": None}, {"rope": ["n d -> b 1 n d", "b n d -> b n d"]}),
    "adaptations": [
        lambda model: (),
        lambda model: [Adaptation()],
        lambda model: [Setting(owner=model.blocks[1].attn, name="fused_attn", value=False)],
    ],
    "tower": [lambda model: None, lambda model: model],
}
"""For each field of a `Backbone` what is right of a model, in several forms."""
FALSE_FIELDS: dict[str, list[Field]] = {
    "blocks": [
        *_always(None, (), [], 7, "blocks", [None], ["blocks.0"], nn.ModuleDict({"a": nn.Linear(2, 2)}), {}),
        lambda model: iter(model.blocks), lambda model: model.blocks[0], lambda model: model,
        lambda model: [[block] for block in model.blocks], lambda model: [*model.blocks, model.blocks[0]],
        lambda model: [nn.Identity(), *model.blocks], lambda model: [model.blocks, [1]],
    ],
    "num_prefix_tokens": _always(-1, 1.5, 1.0, "1", None, [1], math.nan, True, torch.tensor(1)),
    "embed_dim": _always(0, -16, 16.0, "16", None, (16,), math.inf, True),
    "num_suffix_tokens": _always(-1, 0.0, "0", None, [], False),
    "class_token": _always(None, "yes", 1, []),
    "patch_size": _always(*_NO_SIDES),
    "grid_size": _always(*_NO_SIDES),
    "final_norm": [
        *_always("norm", 3, [], nn.LayerNorm(16)), lambda model: type(model.norm), lambda model: [model.norm],
    ],
    "downstream": _always("none", "", None, [], 3, True),
    "attentions": [
        *_always(7, "attn", [], [[]], [None] * 4, [None] * 5, {}, [[3]] * 4, [[3]] * 5),
        lambda model: [block.attn for block in model.blocks], lambda model: _attentions(model)[1:],
        lambda model: [*_attentions(model), []], lambda model: [[nn.Identity()] for _ in model.blocks],
        lambda model: [[block.attn, block.attn] for block in model.blocks],
        lambda model: [[block, block.attn] for block in model.blocks],
        lambda model: [["attn"] for _ in model.blocks], lambda model: [[[block.attn]] for block in model.blocks],
    ],
    "token_inputs": _always(
        None, 3, ["attn_mask"], "attn_mask", {3: None}, {"attn_mask": "b n -> b n"}, {"attn_mask": 3},
        {"attn_mask": [3]}, {"attn_mask": ["nonsense"]}, {"attn_mask": ["b d -> b d"]}, {"attn_mask": [""]},
    ),
    "adaptations": [
        *_always(None, 3, "settings", [3], [None], [Adaptation]), lambda model: Adaptation(),
        lambda model: [Setting(owner=model, name="nonsense", value=1)],
        lambda model: Setting(owner=model.blocks[1].attn, name="fused_attn", value=False),
        lambda model: [TokenTable(owner=nn.Identity(), name="table", pattern="n d -> b n d", build=torch.zeros)],
    ],
    "tower": [
        *_always("model", 3, [], nn.Identity()), lambda model: model.head, lambda model: model.blocks[0],
        lambda model: type(model), lambda model: [model],
    ],
}  # fmt: skip
"""What must be refused."""
WRONG_FIELDS: dict[str, list[Field]] = {
    "blocks": [
        lambda model: model.blocks[1:], lambda model: model.blocks[:-1], lambda model: model.blocks[::2],
        lambda model: [*reversed(model.blocks)], lambda model: [model.blocks[1], model.blocks[0], *model.blocks[2:]],
        lambda model: [block.attn for block in model.blocks], lambda model: [block.mlp for block in model.blocks],
        lambda model: [model.head, *model.blocks], lambda model: [*model.blocks, model.head],
        lambda model: [*model.blocks[:2], model.blocks[3], model.blocks[2]], lambda model: [model.blocks],
        lambda model: [model.patch_embed, *model.blocks],
    ],
    "num_prefix_tokens": _always(0, 1, 2, 3, 4, 12, 17, 27, 200, 10**400),
    "embed_dim": _always(1, 4, 8, 12, 15, 18, 32, 64, 10**6),
    "num_suffix_tokens": _always(1, 2, 13, 15, 16, 24, 100),
    "patch_size": _always((4, 4), (16, 16), (1, 1), (8, 4), (7, 7), (10**6, 1)),
    "grid_size": _always((1, 1), (4, 4), (2, 8), (5, 5), (100, 1), [6, 4]),
    "final_norm": [lambda model: model.blocks[2].norm1, lambda model: model.head, lambda model: model.patch_embed,
                   lambda model: model],
    "downstream": _always("any number"),
    "attentions": [
        lambda model: [[] for _ in model.blocks], lambda model: [[block.mlp] for block in model.blocks],
        lambda model: [[model.head] for _ in model.blocks], lambda model: [[block] for block in model.blocks],
        lambda model: [*reversed(_attentions(model))], lambda model: [[block.attn.qkv] for block in model.blocks],
        lambda model: [_attentions(model)[1] for _ in model.blocks],
        lambda model: [[model.blocks], *_attentions(model)[1:]],
    ],
    "token_inputs": _always({"nonsense": None}, {"x": ["b n d -> b n d"]}),
}  # fmt: skip
"""What nobody can see is wrong before the model runs, or even then."""


# Images

_SIDES = st.one_of(st.sampled_from([8, 16, 32, 32, 40, 48, 64]), st.integers(0, 70))


@st.composite
def _images(draw: st.DrawFn) -> Any:
    kind = draw(st.sampled_from(["size", "size", "size", "fits", "type", "shape", "numbers", "memory", "odd"]))
    batch = draw(st.sampled_from([0, 1, 1, 2, 3]))
    generator = torch.Generator().manual_seed(4)
    if kind == "size":
        return torch.randn(batch, 3, draw(_SIDES), draw(_SIDES), generator=generator)
    images = torch.randn(batch, 3, 32, draw(st.sampled_from([32, 48])), generator=generator)
    if kind == "type":
        dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
        return images.to(draw(st.sampled_from(dtypes)))
    if kind == "shape":
        shapes: list[Callable[[Tensor], Any]] = [
            lambda images: images[:, :1], lambda images: images[:, :0], lambda images: images[:, [0, 1, 2, 0]],
            lambda images: images[0] if len(images) else images, lambda images: images.flatten(),
            lambda images: images.unsqueeze(0), lambda images: images.permute(0, 2, 3, 1), lambda images: images.sum(),
        ]  # fmt: skip
        return draw(st.sampled_from(shapes))(images)
    if kind == "numbers":
        number = draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e38, 0.0, -1e-45, 1e4]))
        where = draw(st.sampled_from([slice(None), slice(0, 1), slice(4, 9)]))
        images[:1, :, where, where] = number
    if kind == "memory":
        views: list[Callable[[Tensor], Any]] = [
            lambda images: images.to(memory_format=torch.channels_last), lambda images: images.transpose(2, 3),
            lambda images: images[:1].expand(3 * min(batch, 1), -1, -1, -1), lambda images: images.flip(0),
            lambda images: images[::2], lambda images: images.requires_grad_(),
        ]  # fmt: skip
        return draw(st.sampled_from(views))(images)
    return draw(ODD) if kind == "odd" else images


IMAGES = _images()
"""What a model is called with, of a size that it was built for or not."""
