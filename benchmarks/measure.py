"""Statistics and resources: bootstrap intervals over clips, the time and the peak memory of a piece of work."""

import contextlib
import ctypes
import gc
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

RESAMPLES = 2000
SAMPLE_SECONDS = 0.01
Row = Mapping[str, np.ndarray | float]  # the sums that one clip contributes, by name
Rows = Mapping[str, np.ndarray]  # those of all clips, stacked: [n, ...]
Statistic = Callable[[Rows], float]


@dataclass(frozen=True)
class Estimate:
    """A pooled statistic, its 95 % interval, and over how many clips; NaN is what could not be measured."""

    value: float
    low: float = math.nan
    high: float = math.nan
    count: int = 0


def stack(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Rows with the same names to one array [n, ...] each, float64."""
    return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in (rows[0] if rows else ())}


def bootstrap(rows: Sequence[Row], statistic: Statistic, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The statistic of all rows, and the percentile interval of it over rows drawn with replacement.

    The statistic is computed anew on every resample, so ratios and logarithms are of pooled sums. One row has no
    interval. Resamples on which it is undefined (0/0) are left out.
    """
    if not rows:
        return Estimate(math.nan)
    stacked, count = stack(rows), len(rows)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(stacked))
        if count == 1 or not math.isfinite(value):
            return Estimate(value, count=count)
        draws = np.random.default_rng(seed).integers(count, size=(resamples, count))
        drawn = [float(statistic({name: array[draw] for name, array in stacked.items()})) for draw in draws]
    kept = [number for number in drawn if math.isfinite(number)]
    low, high = np.percentile(kept, (2.5, 97.5)) if kept else (math.nan, math.nan)
    return Estimate(value, float(low), float(high), count)


@dataclass
class Cost:
    """Wall seconds, and the peak memory in bytes: of the device on CUDA, else resident memory of the process."""

    seconds: float = 0.0
    peak_bytes: int | None = None
    _peak: int = field(default=0, repr=False)


@contextmanager
def measured(device: torch.device) -> Iterator[Cost]:
    """Measure what runs inside; the numbers stand in the Cost when the block has ended."""
    _release()
    cost, stop = Cost(), threading.Event()
    cuda = device.type == "cuda"
    watch = threading.Thread(target=_watch, args=(cost, stop), daemon=True)
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    elif resident_bytes() is not None:
        watch.start()
    start = time.perf_counter()
    try:
        yield cost
    finally:
        if cuda:
            torch.cuda.synchronize(device)
        cost.seconds = time.perf_counter() - start
        stop.set()
        if watch.is_alive():
            watch.join()
        cost.peak_bytes = torch.cuda.max_memory_allocated(device) if cuda else cost._peak or None


def resident_bytes() -> int | None:
    """Resident memory of this process, None where the system does not say."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS:")), None)


def _release() -> None:
    """Give freed memory back to the system, so that what ran before does not count as resident now."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def _watch(cost: Cost, stop: threading.Event) -> None:
    ended = False
    while not ended:  # looks once more after the end, so that short work is seen too
        ended = stop.wait(SAMPLE_SECONDS)
        cost._peak = max(cost._peak, resident_bytes() or 0)
