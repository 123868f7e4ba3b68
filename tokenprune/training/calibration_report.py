"""What a calibration did, and what it was worth."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from tokenprune.training.comparison import Measure

if TYPE_CHECKING:
    from rich.table import Table

REPORT_VERSION = 1
Stop = Literal["done", "interrupted", "images ended"]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far the pruned model agrees with the dense one, on images that were held back, at one plan.

    Attributes:
        keep_ratios: The cumulative fractions of the patch tokens that the stages keep.
        before: Before the calibration: the share of images with the same best class, or the mean cosine of features.
        after: The same with what was left in the model.
    """

    keep_ratios: tuple[float, ...]
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class CalibrationReport:
    """What `calibrate` did.

    Attributes:
        measure: What agreement is: ``"top-1 agreement"`` or ``"feature cosine"``.
        agreements: Agreement with the dense model, first at the model's own keep ratios.
        steps: Steps done.
        step_left: The step whose scorers were left in the model; 0 = as they were before.
        stopped: Why it ended: ``"done"``, ``"interrupted"`` or ``"images ended"``.
        num_images: Images trained on, repetitions counted.
        num_validation_images: Images that the agreement was measured on.
        kept_ratios: The mean fraction of patch tokens that each stage kept, at the model's own keep ratios, of those.
        losses: The loss of each step.
        seconds: How long it took.
    """

    measure: Measure
    agreements: tuple[Agreement, ...]
    steps: int
    step_left: int
    stopped: Stop
    num_images: int
    num_validation_images: int
    kept_ratios: tuple[float, ...]
    losses: tuple[float, ...]
    seconds: float

    @property
    def before(self) -> float:
        """Agreement with the dense model at the model's own keep ratios, before."""
        return self.agreements[0].before

    @property
    def after(self) -> float:
        """The same afterwards."""
        return self.agreements[0].after

    def to_json(self) -> str:
        """All attributes as a JSON object that `from_json` reads, with a version."""
        return json.dumps({"version": REPORT_VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> CalibrationReport:
        """Read what `to_json` wrote.

        Raises:
            ValueError: The text is no such report, or one of a later version.
        """
        try:
            found: dict[str, Any] = json.loads(text)
            version = found.pop("version")
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise ValueError(f"not a calibration report: {type(error).__name__}: {error}") from error
        if version != REPORT_VERSION:
            raise ValueError(f"calibration report of version {version!r}; this tokenprune reads {REPORT_VERSION}.")
        try:
            agreements = tuple(_from_fields(Agreement, one) for one in found.pop("agreements"))
            report: CalibrationReport = _from_fields(cls, {**found, "agreements": agreements})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a calibration report: {error}") from error
        return report

    def __str__(self) -> str:
        return (
            f"{self.measure} with the dense model {self.before:.3f} → {self.after:.3f} in {self.steps} steps "
            f"({self.num_images} images, {self.seconds:.0f} s){'' if self.stopped == 'done' else ', ' + self.stopped}"
        )

    def __rich__(self) -> Table:
        """The report as a rich table."""
        from rich.table import Table

        table = Table(title=f"{self.measure} with the dense model, on {self.num_validation_images} images", caption=(
            f"{self.steps} steps on {self.num_images} images in {self.seconds:.0f} s; step {self.step_left} was left"
            f"{'' if self.stopped == 'done' else f' ({self.stopped})'}"
        ))  # fmt: skip
        for name in ("kept by the stages", "before", "after"):
            table.add_column(name, justify="right")
        for one in self.agreements:
            kept = " / ".join(f"{ratio:.0%}" for ratio in one.keep_ratios)
            table.add_row(kept, f"{one.before:.3f}", f"{one.after:.3f}")
        return table


def _from_fields(kind: Any, found: dict[str, Any]) -> Any:
    """A dataclass of fields as JSON has them, lists as tuples."""
    expected = {field.name for field in fields(kind)}
    if set(found) != expected:
        raise TypeError(f"{kind.__name__} has the fields {sorted(expected)}, and there are {sorted(found)}.")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})
