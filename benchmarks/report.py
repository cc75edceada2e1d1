"""A measurement as a record for programs and as tables for people."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..runtime.sidecar import describe_profile, dtype_name
from .clips import LengthPoint
from .clock import INSIDE, ClockName, Timing
from .identity import identity
from .models import Models
from .peak import Peak, device_peak, measured_peak
from .rows import Row
from .statistics import growth, line_fit, median
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
    """What a case has measured."""

    rows: list[Row] = field(default_factory=list)
    lengths: list[LengthPoint] = field(default_factory=list)


def make_record(
    case: str, models: Models, variants: Mapping[str, Variant], result: Result, peaks: Peaks, timing: Timing
) -> dict[str, Any]:
    """Everything that was measured, and on what, as plain JSON values; raw samples included."""
    return {
        "format": 1,
        "case": case,
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


def lengths_json(points: Sequence[LengthPoint]) -> dict[str, Any]:
    """The points, and for each way how its time grows: the exponent, and how far from a line over segments it is."""
    fits = {}
    for way in dict.fromkeys(point.way for point in points):
        own = [point for point in points if point.way == way]
        denoise = [median(point.denoise).value for point in own]
        if len(own) > 1:
            blocks = [(point.frames - 1) for point in own]
            over = [point.segments for point in own] if way == "segments" else blocks
            fits[way] = {
                "denoise_growth_exponent": growth(blocks, denoise),
                "denoise_from_a_line": line_fit(over, denoise)[2] if len(own) > 2 else None,
                "denoise_seconds_a_segment": [a / point.segments for a, point in zip(denoise, own, strict=True)],
            }
    return {"points": [asdict(point) for point in points], "growth": fits}


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
