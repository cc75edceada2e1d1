"""Whole clips: where their time goes, and when the first frames are there."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from ..engine.profile import Profile
from ..runtime.session import Request, Session
from ..runtime.timing import Timings
from .clock import CLOCKS, ClockName, Samples, Timing, Work, time_in_turns
from .flops import clip_flops
from .models import Models
from .rows import PeakOf, Row, parity, ratios
from .variants import Variant

STAGES = ("prompt", "stage1", "reference", "denoise", "decode", "frames")
PROMPT = "slow zoom in, camera pans left"
ALIKE = 0.3  # relative distance of frames that still show the same; of unrelated ones it is about 0.5 and more


class StageClock(Timings):
    """Timings of a session's stages by the clock that the whole call is timed by."""

    def __init__(self, device: torch.device, clock: ClockName) -> None:
        super().__init__(device)
        self._clock: ClockName = clock

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self.device.type == "cuda":
            with super().phase(name):
                yield
        else:
            now = CLOCKS[self._clock]
            start = now()
            yield
            self._seconds[name] += now() - start


@dataclass
class Runs:
    """A session of one variant that is timed, and the seconds of every stage of each of its calls."""

    session: Session
    clock: ClockName
    stages: list[dict[str, float]] = field(default_factory=list)

    def start(self) -> None:
        self.session.timings = StageClock(self.session.device, self.clock)

    def stop(self) -> None:
        self.stages.append(self.session.timings.seconds())


def open_session(models: Models, variant: Variant) -> Session:
    """A session on a variant's own graphs, which are opened when first called."""
    return Session(variant.profile, variant.graphs, models.prompts, models.device, models.image_encoder, variant.copier)


def sample_request(profile: Profile) -> Request:
    """A request with a noise image: the time does not depend on what is to be seen."""
    image = np.random.default_rng(0).integers(0, 256, (profile.height, profile.width, 3), np.uint8)
    return Request(image, PROMPT)


def clip_rows(models: Models, variants: dict[str, Variant], peak_of: PeakOf, timing: Timing) -> list[Row]:
    """A clip from request to the last frame on the host: one row in all, one for each stage, and what no stage has."""
    sessions = {name: Runs(open_session(models, variant), timing.clock) for name, variant in variants.items()}

    def work(one: Runs) -> Work:
        request = sample_request(one.session.profile)
        return Work(lambda: _frames(one.session, request), one.start, one.stop)

    works = {name: work(one) for name, one in sessions.items()}
    samples, distances = _timed(works, models, timing)
    rows = []
    for name, one in sessions.items():
        flops = clip_flops(variants[name].profile)
        rate = peak_of(variants[name].dtype).rate
        total = sum(flops.values())
        rows += stage_rows(name, samples[name], one.stages, flops, rate, timing.warmup)
        found = ratios(samples, name)
        rows.append(Row("clip", name, samples[name], total, total / rate, distances.get(name), found))
    return rows


def stage_rows(
    name: str, total: Samples, stages: Sequence[dict[str, float]], flops: dict[str, int], rate: float, warmup: int
) -> list[Row]:
    """Rows of the stages of calls that took `total`, and `unaccounted`: what is left of each call."""
    warm = stages[1 + warmup : 1 + warmup + len(total.warm)]  # the cold call comes first, the one for memory last
    rows = []
    for stage in STAGES:
        samples = Samples(stages[0].get(stage, 0.0), [one.get(stage, 0.0) for one in warm])
        work = flops.get(stage, 0)
        rows.append(Row(stage, name, samples, work, work / rate if work else None))
    left = [seconds - sum(one.values()) for seconds, one in zip(total.warm, warm, strict=True)]
    rows.append(Row("unaccounted", name, Samples(total.cold - sum(stages[0].values()), left)))
    return rows


def first_frames_rows(models: Models, variants: dict[str, Variant], peak_of: PeakOf, timing: Timing) -> list[Row]:
    """From request to the first segment's frames on the host. Frame 0 is the image itself and needs no time."""

    def work(session: Session) -> Work:
        request = sample_request(session.profile)
        return Work(lambda: torch.from_numpy(next(iter(session.generate(request))).frames))

    works = {name: work(open_session(models, variant)) for name, variant in variants.items()}
    samples, distances = _timed(works, models, timing)
    rows = []
    for name, variant in variants.items():
        profile = variant.profile
        flops = first_flops(profile)
        frames = profile.noisy * profile.block_frames + 1
        bound = flops / peak_of(variant.dtype).rate
        note = f"frames 0 to {frames - 1} of {profile.frames}"
        found = ratios(samples, name)
        rows.append(Row("first-frames", name, samples[name], flops, bound, distances.get(name), found, note))
    return rows


def first_flops(profile: Profile) -> int:
    """Operations until the first segment is decoded: Stage I in full, of Stage II one segment."""
    whole, one = clip_flops(profile), clip_flops(profile.override(frames=profile.noisy * profile.block_frames + 1))
    return whole["prompt"] + whole["stage1"] + sum(one[stage] for stage in ("reference", "denoise", "decode"))


def _timed(works: dict[str, Work], models: Models, timing: Timing) -> tuple[dict[str, Samples], dict[str, float]]:
    """Times, and how far every variant's frames are from the first one's: relative L2 of the levels.

    NumericsError where they show something else: a step of rounding grows over a clip, but not to that.
    """
    distances: dict[str, float] = {}

    def compare(results: Mapping[str, object]) -> None:
        distances.update(parity(results, dict.fromkeys(results, ALIKE), "clip"))

    return time_in_turns(works, models.device, timing, memory=len(works) == 1, on_cold=compare), distances


def _frames(session: Session, request: Request) -> torch.Tensor:
    """All frames of a clip, uint8 [T, H, W, 3]."""
    return torch.cat([torch.from_numpy(chunk.frames) for chunk in session.generate(request)])
