"""Stage II of clips of several lengths, in segments and as one window of all blocks: how their time grows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..engine.calls import dit_conditions
from ..engine.profile import Profile
from ..engine.sampler import block_noise, stage_sigmas
from ..engine.segments import plan_segments
from ..engine.stage2 import denoise_segment, window_graphs
from ..engine.state import SegmentState
from .clips import Runs, open_session, sample_request
from .clock import Samples, Timing, Work, time_in_turns
from .flops import clip_flops
from .items import random
from .models import Models
from .statistics import growth, line_fit, median
from .variants import Variant

WAYS = ("segments", "full-sequence")
TIMED = ("reference", "denoise", "decode")  # stages


@dataclass(frozen=True)
class LengthPoint:
    """Stage II of a clip of one length in one way: seconds by stage, one entry a run."""

    way: str
    frames: int
    segments: int
    window: int  # blocks of the longest
    flops: int  # of all that is timed
    denoise_flops: int
    denoise: tuple[float, ...]
    samples: Samples


def length_points(
    models: Models,
    open_variant: Callable[[Profile], Variant],
    lengths: Sequence[int],
    ways: Sequence[str],
    timing: Timing,
    denoising_alone: bool,
) -> Iterator[list[LengthPoint]]:
    """Stage II of clips of several lengths; the points of a length, one for each way, as soon as it is timed.

    The ways of a length are timed in turns. `open_variant` gives the graphs of a profile. Timed is all but Stage I, or
    the denoising steps alone.
    """
    for frames in lengths:
        profiles = {way: length_profile(models.profile, frames, way) for way in ways}
        variants = {way: open_variant(profile) for way, profile in profiles.items()}
        runs = {way: Runs(open_session(models, variant), timing.clock) for way, variant in variants.items()}
        make = denoise_work if denoising_alone else stage2_work
        # the memory of one way does not count the other's: nothing but the shared weights outlives a call
        samples = time_in_turns({way: make(one) for way, one in runs.items()}, models.device, timing)
        for variant in variants.values():
            variant.check()
        yield [length_point(way, runs[way], samples[way], timing, denoising_alone) for way in ways]


def length_point(way: str, runs: Runs, samples: Samples, timing: Timing, denoising_alone: bool) -> LengthPoint:
    """The point of one way, from all calls of its session: the cold one and those of warm-up do not count."""
    profile = runs.session.profile
    warm = runs.stages[1 + timing.warmup : 1 + timing.warmup + timing.runs]
    flops = clip_flops(profile)
    return LengthPoint(
        way=way,
        frames=profile.frames,
        segments=len(plan_segments(profile.blocks, profile.noisy, profile.neighbours)),
        window=profile.windows[-1],
        flops=flops["denoise"] if denoising_alone else sum(flops[stage] for stage in TIMED),
        denoise_flops=flops["denoise"],
        denoise=tuple(stages["denoise"] for stages in warm),
        samples=samples,
    )


def length_profile(profile: Profile, frames: int, way: str) -> Profile:
    """A profile of another length, in `segments` or as the `full-sequence` baseline: one window of all blocks."""
    profile = profile.override(frames=frames)
    return profile if way == "segments" else replace(profile, noisy=profile.blocks - 1, neighbours=0)


def stage2_work(one: Runs) -> Work:
    """All but Stage I, whose result is random motion: reference, denoising, decoding, frames to the host."""
    profile, device = one.session.profile, one.session.device
    stage = profile.stage1
    shape = (1, stage.dit.out_channels, profile.blocks, stage.latent_height, stage.latent_width)
    motion = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    request = sample_request(profile)

    def call() -> None:
        clip, state = one.session.prepare(request, motion=motion)
        for _ in one.session.resume(request, clip, state):
            pass

    return Work(call, one.start, one.stop)


def denoise_work(one: Runs) -> Work:
    """The denoising steps of every segment. Reference, text keys and time tables are ready, and nothing is decoded."""
    session, profile, device = one.session, one.session.profile, one.session.device
    stage, sigmas = profile.stage2, stage_sigmas(profile.stage2, profile.stage2_start)
    cells = (stage.vae.latent_channels, stage.latent_height, stage.latent_width)
    reference = random((1, cells[0], profile.blocks, *cells[1:]), torch.float32, device)  # [1, z, F, h, w]
    dtype = session.graphs["stage2_text"].spec.inputs[0].dtype
    text = random((1, stage.dit.text_len, stage.dit.text_dim), torch.float32, device, 1).to(dtype)
    conditions = dit_conditions(session.graphs, "stage2", sigmas, text, text, guidance=stage.guidance)
    anchor, empty = reference[:, :, :1], reference[:, :, :0]

    def call() -> None:
        state = SegmentState(0, anchor, empty, empty, (), (), ())
        for segment in plan_segments(profile.blocks, profile.noisy, profile.neighbours):
            with session.timings.phase("denoise"):
                graphs = window_graphs(session.graphs, segment)
                blocks = reference[:, :, segment.noisy[0] : segment.noisy[-1] + 1]
                noise = block_noise(0, 2, segment.noisy, cells).to(device)
                _, state = denoise_segment(graphs, profile, segment, state, conditions, blocks, noise, sigmas)

    return Work(call, one.start, one.stop)


def growth_words(fit: Mapping[str, Any]) -> str:
    """What growth_json found, in one line."""
    said = (
        f"denoising grows as frames^{fit['denoise_growth_exponent']:.2f}, "
        f"its operations as frames^{fit['operations_growth_exponent']:.2f}"
    )
    if len(fit["denoise_growth_between"]) > 1:
        last, counted = fit["denoise_growth_between"][-1], fit["operations_growth_between"][-1]
        said += f" (between the two longest {last:.2f} and {counted:.2f})"
    away = fit["denoise_from_a_line"]
    return said if away is None else f"{said}, {100 * away:.3g} % from a line at most"


def lengths_json(points: Sequence[LengthPoint]) -> dict[str, Any]:
    """The points, and for each way how its denoising grows with the clip."""
    ways = dict.fromkeys(point.way for point in points)
    by_way = {way: [point for point in points if point.way == way] for way in ways}
    fits = {way: growth_json(own) for way, own in by_way.items() if len(own) > 1}
    return {"points": [asdict(point) for point in points], "growth": fits}


def growth_json(points: Sequence[LengthPoint]) -> dict[str, Any]:
    """How the denoising of one way grows over at least two lengths, beside how its operations do.

    Exponents p of frames^p through all lengths and between neighbouring ones; and how far times are from a line, over
    segments, or over frames in one window. Of operations a L + b L^2 (attention is the square) the exponent at a length
    is 1 + attention's share, so above 1.5 attention is most of the work.
    """
    frames = [point.frames - 1 for point in points]
    seconds = [median(point.denoise).value for point in points]
    operations = [point.denoise_flops for point in points]
    over = [point.segments for point in points] if points[0].way == "segments" else frames
    pairs = [slice(i, i + 2) for i in range(len(points) - 1)]
    return {
        "denoise_growth_exponent": growth(frames, seconds),
        "operations_growth_exponent": growth(frames, operations),
        "denoise_growth_between": [growth(frames[pair], seconds[pair]) for pair in pairs],
        "operations_growth_between": [growth(frames[pair], operations[pair]) for pair in pairs],
        "denoise_from_a_line": line_fit(over, seconds)[2] if len(points) > 2 else None,
        "denoise_seconds_a_segment": [a / point.segments for a, point in zip(seconds, points, strict=True)],
    }
