"""The plan: in front of which blocks tokens are pruned, and how many are kept."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

from tokenprune.errors import PlanError

PLAN_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where a model prunes, and the fraction of the original patch tokens each stage keeps.

    Attributes:
        stages: Indices of the blocks in front of which tokens are pruned, ascending, from 0.
        keep_ratios: For each stage the kept fraction of the *original* patch tokens, in (0, 1],
            never rising from one stage to the next.

    Raises:
        PlanError: A value is out of its range; nothing is made.
    """

    stages: tuple[int, ...]
    keep_ratios: tuple[float, ...]

    def __post_init__(self) -> None:
        stages, ratios = _as_tuple(self.stages, "stages"), _as_tuple(self.keep_ratios, "keep_ratios")
        _check_stages(stages)
        _check_keep_ratios(ratios, len(stages))
        # Whatever sequence or number types came in, plain tuples of int and float are kept.
        object.__setattr__(self, "stages", tuple(int(stage) for stage in stages))
        object.__setattr__(self, "keep_ratios", tuple(float(ratio) for ratio in ratios))

    @classmethod
    def build(
        cls,
        *,
        depth: int,
        stages: Sequence[int] | None,
        keep_ratio: float | Sequence[float],
        level: range | None = None,
    ) -> Plan:
        """Resolve arguments into a plan for a model of ``depth`` blocks.

        Args:
            depth: Number of blocks of the model.
            stages: Block indices, or ``None`` for the multiples of ``depth // 4`` (12 blocks: 3, 6, 9); in a hierarchy
                see `level_stages`.
            keep_ratio: One number ρ means ρ, ρ², ρ³ … of the original patch tokens; a sequence
                gives one cumulative fraction a stage.
            level: Of a hierarchy the blocks in front of which stages may stand; ``None`` means all.

        Raises:
            PlanError: The arguments do not fit together or do not fit the depth.
        """
        if stages is not None:
            chosen = _as_tuple(stages, "stages")
        else:
            chosen = default_stages(depth) if level is None else level_stages(level)
        _check_stages(chosen)
        if int(chosen[-1]) >= depth:
            raise PlanError(
                f"stages={tuple(chosen)}: stage {chosen[-1]} is out of range; the model has {depth} blocks, "
                f"so stages lie in 0 … {depth - 1}."
            )
        if level is not None and not {*map(int, chosen)} <= {*level}:
            raise PlanError(
                f"stages={tuple(chosen)}: in this hierarchy, stages in the level of blocks {level.start} … "
                f"{level.stop - 1} stand in front of these alone."
            )
        return cls(stages=chosen, keep_ratios=cumulative_ratios(keep_ratio, len(chosen)))

    def with_keep_ratio(self, keep_ratio: float | Sequence[float]) -> Plan:
        """The same stages at another ratio, given as in `build`."""
        return Plan(stages=self.stages, keep_ratios=cumulative_ratios(keep_ratio, len(self.stages)))

    def num_keep(self, num_patches: int) -> tuple[int, ...]:
        """Kept patch tokens after each stage: ``floor(num_patches · ratio)``, at least 1."""
        return tuple(num_kept(num_patches, ratio) for ratio in self.keep_ratios)

    @property
    def keeps_all(self) -> bool:
        """Whether no stage prunes anything."""
        return self.keep_ratios[-1] == 1

    @property
    def keep_probabilities(self) -> tuple[float, ...]:
        """For each stage the fraction it keeps of the tokens that reach it, in (0, 1]."""
        before = (1.0, *self.keep_ratios)
        return tuple(ratio / previous for ratio, previous in zip(self.keep_ratios, before, strict=False))

    def to_json(self) -> str:
        """The plan as a JSON object that `from_json` reads, with a version."""
        return json.dumps({"version": PLAN_VERSION, "stages": list(self.stages), "keep_ratios": list(self.keep_ratios)})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            PlanError: The text is no plan, or one of a later version.
        """
        try:
            fields = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:  # endless digits and endless nesting among them
            raise PlanError(f"not a plan: the text is not JSON ({error}).") from error
        if not isinstance(fields, dict) or set(fields) != {"version", "stages", "keep_ratios"}:
            raise PlanError("not a plan: expected a JSON object with 'version', 'stages' and 'keep_ratios'.")
        if fields["version"] != PLAN_VERSION:
            raise PlanError(
                f"plan version {fields['version']!r} cannot be read; this tokenprune reads version {PLAN_VERSION}. "
                "Install the tokenprune that wrote it, or a later one."
            )
        return cls(
            stages=_as_tuple(fields["stages"], "stages"), keep_ratios=_as_tuple(fields["keep_ratios"], "keep_ratios")
        )


def default_stages(depth: int) -> tuple[int, ...]:
    """Three stages at the multiples of ``depth // 4``: DynamicViT's 3, 6, 9 of 12 blocks.

    Raises:
        PlanError: The model has fewer than four blocks.
    """
    step = depth // 4
    if step < 1:
        raise PlanError(f"a model of {depth} blocks has no default stages (it takes 4); pass stages=(…) yourself.")
    return step, 2 * step, 3 * step


def level_stages(level: range) -> tuple[int, ...]:
    """Up to three stages in a level of a hierarchy, at the multiples of a ninth of its blocks.

    Those of DynamicViT's authors: 1, 2, 3 of the 6 blocks of Swin-T, 2, 4, 6 of 18, 3, 6, 9 of 27; counted from the
    level's first block. In a level of three blocks or fewer, there is one in front of each.
    """
    step = max(1, len(level) // 9)
    return tuple(level) if len(level) < 4 else (level[step], level[2 * step], level[3 * step])


def cumulative_ratios(keep_ratio: float | Sequence[float], num_stages: int) -> tuple[float, ...]:
    """One number ρ to ρ, ρ², …; a sequence as it is.

    Raises:
        PlanError: A ratio lies outside (0, 1], the count is wrong, or the ratios rise.
    """
    if isinstance(keep_ratio, Real):
        _check_keep_ratios((keep_ratio,), 1)
        return tuple(float(keep_ratio) ** power for power in range(1, num_stages + 1))
    ratios = _as_tuple(keep_ratio, "keep_ratio")
    _check_keep_ratios(ratios, num_stages)
    return ratios


def num_kept(num_patches: int, ratio: float) -> int:
    """How many of a number of tokens a ratio keeps: the floor of their product, and at least one."""
    # A product such as 100 · 0.7² = 48.999999999999993 means 49: rounding errors are no reason to lose a token.
    return max(1, math.floor(num_patches * ratio + 1e-9))


def _as_tuple(values: Any, name: str) -> tuple[Any, ...]:
    try:
        return tuple(values)
    except TypeError:
        raise PlanError(f"{name}={values!r}: expected a sequence of numbers.") from None


def _check_stages(stages: Sequence[Any]) -> None:
    if not stages:
        raise PlanError("stages is empty; name at least one block, or pass stages=None for the default.")
    for stage in stages:
        if isinstance(stage, bool) or not isinstance(stage, Integral):
            raise PlanError(f"stages={tuple(stages)}: {stage!r} is not a block index; expected integers from 0.")
        if stage < 0:
            raise PlanError(f"stages={tuple(stages)}: stage {stage} is out of range; block indices start at 0.")
    if list(stages) != sorted(stages):
        raise PlanError(f"stages={tuple(stages)} are not sorted; give ascending block indices.")
    if len(set(stages)) != len(stages):
        raise PlanError(f"stages={tuple(stages)} repeat a block; name each block once.")


def _check_keep_ratios(ratios: Sequence[Any], num_stages: int) -> None:
    if len(ratios) != num_stages:
        raise PlanError(
            f"keep ratios {tuple(ratios)} and {num_stages} stage(s) do not match; "
            "give one number, or one cumulative ratio a stage."
        )
    for ratio in ratios:
        is_number = isinstance(ratio, Real) and not isinstance(ratio, bool)
        # What no float is near enough to, such as 1/10⁴⁰⁰, is no ratio either.
        if not (is_number and 0 < ratio <= 1 and float(ratio) > 0):
            raise PlanError(f"keep ratio {ratio!r} is outside (0, 1]; it is the fraction of patch tokens to keep.")
    # As floats: between NumPy's types, 0.05 of one precision may count as equal to a larger one of another.
    if any(float(later) > float(earlier) for earlier, later in pairwise(ratios)):
        raise PlanError(
            f"keep ratios {tuple(ratios)} rise from stage to stage; they are fractions of the original tokens, "
            "and a pruned token never comes back."
        )
