"""From samples to rows: time, rate, distance from the bound, ratios named as what they are."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..engine.errors import NumericsError
from .clock import Samples, Timing, time_in_turns
from .items import Item
from .peak import Peak
from .statistics import Interval, median, paired_speedup, tails

PARITY = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 1e-2}  # largest relative L2 distance
PeakOf = Callable[[torch.dtype], Peak]


@dataclass(frozen=True)
class Row:
    """One thing one variant did. `bound` is the seconds that its operations take at the device's peak rate."""

    name: str
    variant: str
    samples: Samples
    flops: int = 0
    bound: float | None = None
    parity: float | None = None  # relative L2 distance from the first variant of the item
    ratios: dict[str, Interval] = field(default_factory=dict)  # speedup_vs_NAME
    note: str = ""

    @property
    def time(self) -> Interval:
        return median(self.samples.warm)

    @property
    def rate(self) -> float | None:
        """FLOP/s at the median."""
        return self.flops / self.time.value if self.flops else None

    @property
    def bound_percent(self) -> float | None:
        """How much of the median time the bound is: 100 is the limit."""
        return None if self.bound is None else 100 * self.bound / self.time.value

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "variant": self.variant,
            "cold_seconds": self.samples.cold,
            "seconds": self.time.as_json() | tails(self.samples.warm),
            "samples": self.samples.warm,
            "tflop": self.flops / 1e12,
            "tflops": None if self.rate is None else self.rate / 1e12,
            "bound_seconds": self.bound,
            "bound_percent": self.bound_percent,
            "peak_bytes": self.samples.peak_bytes,
            "parity": self.parity,
            **{f"speedup_vs_{name}": ratio.as_json() for name, ratio in self.ratios.items()},
            **({"note": self.note} if self.note else {}),
        }


def measure_items(items: Sequence[Item], device: torch.device, peak_of: PeakOf, timing: Timing) -> Iterator[list[Row]]:
    """Time items one after another, the variants of each in turns. Gives the rows of an item as soon as it is timed.

    Before its times count, every variant's result is compared with the first's. Peak memory is measured where one
    variant is alone: beside others it would count their weights.
    """
    for item in items:
        rows: list[Row] = []
        distances: dict[str, float] = {}

        def compare(results: Mapping[str, object], item: Item = item, distances: dict[str, float] = distances) -> None:
            limits = {name: PARITY[dtype] for name, dtype in item.dtypes.items()}
            distances.update(parity(results, limits, item.name))

        samples = time_in_turns(item.works, device, timing, memory=len(item.works) == 1, on_cold=compare)
        for name, sample in samples.items():
            bound = item.flops / peak_of(item.dtypes[name]).rate
            found = ratios(samples, name)
            note = item.notes.get(name, "")
            rows.append(Row(item.name, name, sample, item.flops, bound, distances.get(name), found, note))
        yield rows


def ratios(samples: Mapping[str, Samples], name: str) -> dict[str, Interval]:
    """How many times faster `name` is than the first variant, and than every one that is plain fp32."""
    bases = [base for i, base in enumerate(samples) if i == 0 or base in ("eager_fp32", "diffusers_eager_fp32")]
    return {base: paired_speedup(samples[base].warm, samples[name].warm) for base in bases if base != name}


def parity(results: Mapping[str, object], limits: Mapping[str, float], item: str) -> dict[str, float]:
    """Relative L2 distance of each result from the first. NumericsError above the larger of both limits."""
    (first, want), *others = results.items()
    distances = {}
    for name, got in others:
        assert isinstance(want, Tensor)
        assert isinstance(got, Tensor)
        distance = float((got.float() - want.float()).norm() / want.float().norm())
        limit = max(limits[name], limits[first])
        if not distance <= limit:
            raise NumericsError(
                f"{item} of {name}: got a relative distance of {distance:.1e} from {first}, want at most {limit:.0e}; "
                "they do not compute the same, so their times are not compared; report it"
            )
        distances[name] = distance
    return distances
