"""The speed cases by name: each takes what is compared and gives what it measured, part by part."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..engine.errors import ProfileError
from ..engine.profile import Profile
from .attention_items import attention_items
from .clips import clip_rows, first_frames_rows
from .clock import Timing
from .items import Bench, Item, dit_items, vae_items
from .ladder import climb, ladders
from .lengths import WAYS, length_points
from .report import Peaks, Result
from .rows import measure_items
from .variants import Variant, eager_variant


@dataclass(frozen=True)
class Plan:
    """How often to measure, at which lengths, with what beside, and who hears of what is left out."""

    timing: Timing
    lengths: tuple[int, ...] = ()
    denoising_alone: bool = False  # of the lengths
    compiling: bool = False
    cache: Path | None = None  # where measured kernels are kept
    say: Callable[[str], None] = field(default=lambda _: None)


Case = Callable[[Bench, Peaks, Plan], Iterator[Result]]


def dit_stage1(bench: Bench, peaks: Peaks, plan: Plan) -> Iterator[Result]:
    """One forward of Stage I, all blocks at low resolution."""
    return _items(bench, dit_items(bench, "stage1"), peaks, plan)


def dit_stage2(bench: Bench, peaks: Peaks, plan: Plan) -> Iterator[Result]:
    """One forward of Stage II, for the first window and a later one."""
    return _items(bench, dit_items(bench, "stage2"), peaks, plan)


def vae_encode(bench: Bench, peaks: Peaks, plan: Plan) -> Iterator[Result]:
    """Both VAEs' encoders: one block of a stream, and a whole clip."""
    return _items(bench, vae_items(bench, "encode"), peaks, plan)


def vae_decode(bench: Bench, peaks: Peaks, plan: Plan) -> Iterator[Result]:
    """Both VAEs' decoders: one block of a stream, and a whole clip."""
    return _items(bench, vae_items(bench, "decode"), peaks, plan)


def attention(bench: Bench, peaks: Peaks, plan: Plan) -> Iterator[Result]:
    """Self-attention of one layer on each window, by every kernel that torch has here."""
    dtypes = list(dict.fromkeys(variant.dtype for variant in bench.variants.values()))
    return _items(bench, attention_items(bench.models, dtypes, plan.say), peaks, plan)


def clip(bench: Bench, peaks: Peaks, plan: Plan) -> Iterator[Result]:
    """A whole clip, request to last frame on the host, by stage. Writing a file is outside."""
    yield Result(clip_rows(bench.models, bench.variants, peaks, plan.timing))


def first_frames(bench: Bench, peaks: Peaks, plan: Plan) -> Iterator[Result]:
    """From request to the frames of the first segment on the host."""
    yield Result(first_frames_rows(bench.models, bench.variants, peaks, plan.timing))


def length(bench: Bench, peaks: Peaks, plan: Plan) -> Iterator[Result]:
    """Stage II of clips of several lengths: does a segment cost the same in each?"""
    return _lengths(bench, peaks, plan, WAYS[:1])


def full_sequence(bench: Bench, peaks: Peaks, plan: Plan) -> Iterator[Result]:
    """Stage II in segments against the end-to-end baseline: one window with all blocks, on the same weights."""
    return _lengths(bench, peaks, plan, WAYS)


def ladder(bench: Bench, peaks: Peaks, plan: Plan) -> Iterator[Result]:
    """Every optimisation on its own rung, each timed in turns with the one below."""
    narrow = next(iter(bench.variants.values())).dtype
    for name, rungs in ladders(bench.models, narrow, plan.compiling, plan.cache).items():
        for row in climb(name, rungs, bench.models, peaks, plan.timing):
            yield Result([row])


def cpu_nano(bench: Bench, peaks: Peaks, plan: Plan) -> Iterator[Result]:
    """What a laptop can measure of all of the above: both DiTs, both VAEs and a whole clip of nano on the CPU."""
    for case in (dit_stage1, dit_stage2, vae_encode, vae_decode, clip):
        yield from case(bench, peaks, plan)


CASES: dict[str, Case] = {
    "dit-stage1": dit_stage1,
    "dit-stage2": dit_stage2,
    "attention": attention,
    "vae-encode": vae_encode,
    "vae-decode": vae_decode,
    "clip": clip,
    "first-frames": first_frames,
    "length": length,
    "full-sequence": full_sequence,
    "ladder": ladder,
    "cpu-nano": cpu_nano,
}
WITH_PEERS = ("dit-stage1", "dit-stage2", "vae-encode", "vae-decode", "cpu-nano")
WITH_LENGTHS = ("length", "full-sequence")
ONE_VARIANT = (*WITH_LENGTHS, "ladder")


def default_lengths(profile: Profile) -> tuple[int, ...]:
    """Three lengths in frames: the profile's own, and about two and three times that (81, 161, 241; 33, 65, 97)."""
    return tuple(times * (profile.frames - 1) + 1 for times in (1, 2, 3))


def check_case(case: str, variants: Sequence[Variant], peers: int) -> None:
    """Refuse what a case does not do."""
    if peers and case not in WITH_PEERS:
        raise ProfileError(f"--peers: got it for {case}, want one of {', '.join(WITH_PEERS)}; leave it out")
    if case in ONE_VARIANT and len(variants) != 1:
        raise ProfileError(f"{case}: got {len(variants)} variants, want one; pass one --dtype or one --bundle")
    if case == "full-sequence" and variants[0].backend != "eager":
        raise ProfileError("full-sequence: got a bundle, want eager, as no bundle holds its window; leave out --bundle")
    if case in ("ladder", "attention") and any(variant.backend != "eager" for variant in variants):
        raise ProfileError(f"{case}: got a bundle, want none, as it makes what it compares itself; leave out --bundle")


def _items(bench: Bench, items: Sequence[Item], peaks: Peaks, plan: Plan) -> Iterator[Result]:
    return map(Result, measure_items(items, bench.models.device, peaks, plan.timing))


def _lengths(bench: Bench, peaks: Peaks, plan: Plan, ways: Sequence[str]) -> Iterator[Result]:
    variant = next(iter(bench.variants.values()))
    peaks(variant.dtype)

    def open_variant(profile: Profile) -> Variant:
        if variant.backend == "eager":
            return eager_variant(bench.models, variant.dtype, profile)
        return Variant(variant.name, variant.backend, variant.dtype, profile, variant.graphs, variant.digest)

    lengths = plan.lengths or default_lengths(bench.profile)
    for points in length_points(bench.models, open_variant, lengths, ways, plan.timing, plan.denoising_alone):
        yield Result(lengths=points)
