"""Timing calls: cold apart from warm, variants in turns in one process, memory in a call of its own."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from ..engine.errors import ProfileError
from .measure import measured

Call = Callable[[], object]
ClockName = Literal["wall", "process"]
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
INSIDE = (
    "CUDA: events around one call on its stream, waited for after the call; CPU: the clock around one call. Inputs are "
    "ready on the device. Loading, building and the copies that donated inputs need are outside."
)


@dataclass(frozen=True)
class Timing:
    """How often to call, and by which clock on a CPU.

    `process` is the seconds that cores worked for this process, all threads added up: with one thread it is what the
    wall clock would show on a machine that does nothing else.
    """

    runs: int = 10
    warmup: int = 2
    clock: ClockName = "wall"

    def __post_init__(self) -> None:
        if self.runs < 1 or self.warmup < 0:
            raise ProfileError(f"runs and warmup: got {self.runs} and {self.warmup}, want at least 1 and 0; pass more")


@dataclass(frozen=True)
class Work:
    """One thing to time: `call` is timed, `before` and `after` are called untimed around every call."""

    call: Call
    before: Call = lambda: None
    after: Call = lambda: None


@dataclass
class Samples:
    """Seconds of the first call, of the calls after warm-up, and peak memory of one call in bytes."""

    cold: float
    warm: list[float] = field(default_factory=list)
    peak_bytes: int | None = None


def time_in_turns(
    works: Mapping[str, Work],
    device: torch.device,
    timing: Timing,
    memory: bool = True,
    on_cold: Callable[[Mapping[str, object]], None] = lambda _: None,
) -> dict[str, Samples]:
    """Time several works in turns A B C A B C ..., so that noise of the machine hits all alike.

    The first call of each is the cold one and is followed by `warmup` more that do not count. Every second turn goes
    backwards, because who follows whom matters to caches. `on_cold` gets the results of the cold calls.
    """
    samples, results = {}, {}
    for name, work in works.items():
        seconds, results[name] = time_once(work, device, timing.clock)
        samples[name] = Samples(seconds)
    on_cold(results)
    results.clear()
    for work in works.values():
        for _ in range(timing.warmup):
            time_once(work, device, timing.clock)
    order = list(works)
    for turn in range(timing.runs):
        for name in order if turn % 2 == 0 else reversed(order):
            samples[name].warm.append(time_once(works[name], device, timing.clock)[0])
    if memory:  # afterwards: the watch takes time of its own
        for name, work in works.items():
            work.before()
            with measured(device) as cost:
                work.call()
            samples[name].peak_bytes = cost.peak_bytes
            work.after()
    return samples


def time_once(work: Work, device: torch.device, clock: ClockName = "wall") -> tuple[float, object]:
    """Seconds of one call, by the device's own clock on CUDA and else by the one named, and its result."""
    work.before()
    if device.type != "cuda":
        now = CLOCKS[clock]
        start = now()
        result = work.call()
        seconds = now() - start
    else:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        stream = torch.cuda.current_stream(device)
        begin.record(stream)
        result = work.call()
        end.record(stream)
        end.synchronize()
        seconds = begin.elapsed_time(end) / 1000
    work.after()
    return seconds, result
