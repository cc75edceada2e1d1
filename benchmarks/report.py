"""A measurement as a record for programs and as tables for people."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..runtime.sidecar import describe_profile, dtype_name
from .clock import INSIDE, ClockName, Timing
from .identity import identity
from .lengths import LengthPoint, lengths_json
from .models import Models
from .peak import Peak, device_peak, measured_peak
from .rows import Row
from .statistics import median
from .variants import Variant, describe_variant

HEADER = ("what", "variant", "cold", "median", "95 % interval", "TFLOP/s", "of bound", "peak", "faster than")
LENGTH_HEADER = ("way", "frames", "segments", "window", "denoise", "a segment", "Stage II", "of bound", "peak")


class Peaks:
    """The peak rate of a device in each dtype, found when first asked for; on a GPU also what products reach of it."""

    def __init__(self, device: torch.device, clock: ClockName = "wall") -> None:
        self.device = device
        self._clock: ClockName = clock
        self.found: dict[torch.dtype, Peak] = {}
        self.reached: dict[torch.dtype, Peak] = {}

    def __call__(self, dtype: torch.dtype) -> Peak:
        if dtype not in self.found:
            self.found[dtype] = device_peak(self.device, dtype, self._clock)
            if self.device.type == "cuda":
                self.reached[dtype] = measured_peak(self.device, dtype)
        return self.found[dtype]


@dataclass
class Result:
    """What a case has measured, or a part of it."""

    rows: list[Row] = field(default_factory=list)
    lengths: list[LengthPoint] = field(default_factory=list)

    def add(self, part: "Result") -> None:
        self.rows += part.rows
        self.lengths += part.lengths

    @property
    def words(self) -> str:
        """What there is, in one line: names of rows, and the figures of a length, as the next may take long."""
        alone = len(self.rows) == 1  # a rung
        names = dict.fromkeys(f"{row.name} {row.variant}" if alone else row.name for row in self.rows)
        said = [
            f"{point.frames} frames in {seconds(median(point.denoise).value)} ({point.way})" for point in self.lengths
        ]
        return ", ".join([*names, *said])


def make_record(
    case: str,
    models: Models,
    variants: Mapping[str, Variant],
    result: Result,
    peaks: Peaks,
    timing: Timing,
    complete: bool = True,
) -> dict[str, Any]:
    """Everything that was measured, and on what, as plain JSON values; raw samples included.

    `complete` is false where the case goes on: a run that is stopped leaves such a record.
    """
    return {
        "format": 1,
        "case": case,
        "complete": complete,
        "identity": identity(models),
        "profile": describe_profile(models.profile),
        "variants": {name: describe_variant(variant) for name, variant in variants.items()},
        "timer": {"inside": INSIDE, **asdict(timing)},
        "bound": "operations of the eager graphs, counted on the meta device, at the peak rate of products",
        "peak": {dtype_name(dtype): peak.as_json() for dtype, peak in peaks.found.items()},
        "products_reach": {dtype_name(dtype): peak.as_json() for dtype, peak in peaks.reached.items()},
        "rows": [row.as_json() for row in result.rows],
        **({"lengths": lengths_json(result.lengths)} if result.lengths else {}),
    }


def row_cells(row: Row) -> tuple[str, ...]:
    """A row for the table of HEADER."""
    time = row.time
    interval = "" if time.low is None or time.high is None else f"{seconds(time.low)} - {seconds(time.high)}"
    rate = "" if row.rate is None else f"{row.rate / 1e12:.3g}"
    bound = "" if row.bound_percent is None else f"{row.bound_percent:.3g} %"
    faster = [f"{ratio.value:.2f}x {name}" for name, ratio in row.ratios.items()]
    cold = seconds(row.samples.cold)
    return (
        row.name, row.variant, cold, seconds(time.value), interval, rate, bound,
        size(row.samples.peak_bytes), ", ".join(faster),
    )  # fmt: skip


def length_cells(point: LengthPoint, rate: float) -> tuple[str, ...]:
    """A row for the table of LENGTH_HEADER; `rate` is the peak's."""
    denoise, total = median(point.denoise).value, median(point.samples.warm).value
    return (
        point.way, str(point.frames), str(point.segments), str(point.window), seconds(denoise),
        seconds(denoise / point.segments), seconds(total), f"{100 * point.flops / rate / total:.3g} %",
        size(point.samples.peak_bytes),
    )  # fmt: skip


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; empty columns are left out."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [[header[i] for i in kept], *([row[i] for i in kept] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(kept))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def seconds(value: float) -> str:
    return f"{value:.3g} s" if abs(value) >= 1 else f"{1000 * value:.3g} ms"


def size(value: int | None) -> str:
    return "" if value is None else f"{value / 1e9:.2f} GB"
