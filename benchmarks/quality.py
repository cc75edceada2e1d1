"""The quality case: clips are made and measured one by one, so that memory is that of one."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from typing import Any

import numpy as np
from torch import nn

from ..engine.segments import plan_segments
from ..runtime.models import Loaded
from ..runtime.session import Request, Session
from ..training.prompts import CANONICAL, canonical_motion
from ..training.trainer import step_seed
from ..training.transition import StageOne, TransitionConfig
from .ablations import NOTE, AblationResult, Variant, plan_variants, run_variants, variant_results
from .generation import generate, stage_one, transition_motion
from .measure import Row
from .quality_clips import TruthClip, canonical_low, footage_clip, photo_crop, truth_clip, whole_photo
from .quality_metrics import GENERATED, TRUTH, Group, Result, drift_metrics, evaluate
from .quality_rows import classify_low, describe_truth, generated_row, make_generated, seen_move, truth_row

STATIC = "static shot"
SHOWN = 3  # clips of each kind on the page
FILMED: tuple[Group, ...] = ("truth", "generated")  # what is measured of footage; prompts and static scenes it has not
OnStep = Callable[[str], None]
OnClip = Callable[[int, str, np.ndarray, np.ndarray], None]  # photo, prompt, image, frames of a generated clip
NOTES = (
    "PSNR, sharpness and flicker are of frames 1 to T-1, with squared errors pooled over frames and clips. Intervals: "
    "95 %, percentile bootstrap over clips, 2000 resamples. Clips that share a photograph count as independent, so "
    "with few photographs the intervals are too narrow.",
    "Where a clip is compared with the truth, Stage II gets the truth after stage transition (noised, denoised by "
    "Stage I in {steps} steps, decoded): noised to a level of {lowest:g} to {highest:g}, and a share of {plain:g} only "
    "encoded and decoded. Bicubic is of the same low-resolution clip. "
    "All other clips are real Stage I output. Motions are drawn with the generator's own odds: more moves at once, and "
    "more objects, than `nano` is mostly trained on.",
    "Clip i of a kind is over photograph i of the set; crops go through all of them. Dynamic degree is in pixels of "
    "the low resolution.",
    "Prompt following is a forced choice between six moves, of one prompt a crop in turn, of all six with --full; a "
    "clip that moves less than a tenth of the basic move counts as wrong.",
    "VBench-I2V is not computed here, as it needs metric models that must be downloaded; --export-vbench writes the "
    "clips for its custom input mode.",
)


@dataclass(frozen=True)
class Options:
    """How much is measured: truth and moving clips (half as many static ones), crops for prompts, ablations."""

    clips: int = 16  # each of 8 photographs twice
    crops: int = 64
    seed: int = 0
    full: bool = False
    transition: TransitionConfig = field(default_factory=TransitionConfig)

    @property
    def static(self) -> int:
        return ceil(self.clips / 2)


@dataclass(frozen=True)
class Panel:
    """One clip on the page: frames by column, each (index, frame) list uint8 [H, W, 3]."""

    title: str
    columns: dict[str, list[tuple[int, np.ndarray]]]


@dataclass
class Report:
    """All that the case found."""

    results: list[Result] = field(default_factory=list)
    footage: list[Result] = field(default_factory=list)
    ablations: list[AblationResult] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def work_steps(options: Options, footage: int) -> int:
    """How often `on_step` will be called."""
    return 2 * options.clips + options.static + footage + 2 * options.crops


def run_quality(
    loaded: Loaded,
    photos: Sequence[np.ndarray],
    options: Options,
    footage: Sequence[tuple[str, np.ndarray]] = (),
    on_step: OnStep = lambda _: None,
    on_clip: OnClip | None = None,
    others: Mapping[str, nn.Module] | None = None,
) -> Report:
    """Measure the models on photographs uint8 [h, w, 3], and on footage as (name, frames [T, H, W, 3]).

    `others` are DiTs that the ablations compare with the second one, by name.
    """
    levels = options.transition
    stated = {**asdict(levels), "plain": 1 - levels.probability}
    report, rows = Report(notes=[note.format_map(stated) for note in NOTES]), dict[Group, list[Row]]()
    variants = plan_variants(loaded.profile, others) if options.full else []
    with Session.open(loaded) as session:
        case = _Case(session, loaded, stage_one(loaded), photos, options, report, on_step)
        drawn = (truth_clip(photos, loaded.profile, options.seed, index) for index in range(options.clips))
        rows["truth"] = case.truth(drawn, variants)
        films = (footage_clip(name, frames, loaded.profile, options.seed) for name, frames in footage)
        found = case.truth(films, [], filmed=True)
        rows["moving"] = case.generated(options.clips, list(CANONICAL), on_clip)
        rows["static"] = case.generated(options.static, [STATIC], on_clip)
        rows["generated"] = [*rows["moving"], *rows["static"]]
        rows["following"], rows["control"] = case.following(), case.control()
    plan = plan_segments(loaded.profile.blocks, loaded.profile.noisy, loaded.profile.neighbours)
    report.results = evaluate((*TRUTH, *GENERATED, *drift_metrics(len(plan))), rows, options.seed)
    if found:
        metrics = [replace(metric, gate=None) for metric in (*TRUTH, *GENERATED) if metric.group in FILMED]
        report.footage = evaluate(metrics, dict.fromkeys(FILMED, found), options.seed)
    if variants:
        report.ablations = variant_results(variants, options.seed)
        report.notes.append(NOTE)
    return report


@dataclass
class _Case:
    """What all parts of the case share."""

    session: Session
    loaded: Loaded
    one: StageOne
    photos: Sequence[np.ndarray]
    options: Options
    report: Report
    on_step: OnStep

    def truth(self, clips: Iterable[TruthClip], variants: Sequence[Variant], filmed: bool = False) -> list[Row]:
        """Rows of clips whose truth is known; of footage also what is seen without it."""
        rows: list[Row] = []
        for clip in clips:
            motion = transition_motion(self.one, clip, self.options.transition)
            made = generate(self.session, Request(clip.frames[0], clip.prompt, seed=clip.seed), motion)
            seen = generated_row(self.loaded.profile, clip.frames[0], made) if filmed else {}
            rows.append({**truth_row(self.loaded, clip, made), **seen})
            self.report.details.setdefault("truth_clips", []).append(describe_truth(clip, rows[-1]))
            run_variants(self.loaded, variants, clip, motion)
            if len(rows) <= SHOWN:
                self.report.panels.append(_truth_panel(clip, made.upsampled, made.frames))
            self.on_step(clip.name)
        return rows

    def generated(self, count: int, prompts: list[str], on_clip: OnClip | None) -> list[Row]:
        """Rows of clips made by both stages from whole photographs, the prompts in turn."""
        rows, session, seed = [], self.session, self.options.seed
        for index in range(count):
            image, prompt = whole_photo(self.photos, session.profile, index), prompts[index % len(prompts)]
            row, made = make_generated(session, image, prompt, step_seed(seed, "quality", prompt, index))
            rows.append(row)
            number = index % len(self.photos) + 1
            if on_clip is not None:
                on_clip(number, prompt, image, made.frames)
            if index < SHOWN:
                columns = {"input": made.frames[:1], "Stage I upsampled": made.upsampled, "Stage II": made.frames}
                self.report.panels.append(_panel(f"photo {number}: {prompt}", columns))
            self.on_step(f"photo {number}: {prompt}")
        return rows

    def following(self) -> list[Row]:
        """Whether Stage I does what the six canonical prompts say; one prompt a crop, all six with `full`."""
        prompts, rows, seen = list(CANONICAL), [], Counter()
        for index in range(self.options.crops):
            image = photo_crop(self.photos, self.session.profile, self.options.seed, index)
            chosen = prompts if self.options.full else [prompt_of(index, len(self.photos))]
            right = []
            for prompt in chosen:
                move = seen_move(self.session, image, prompt, step_seed(self.options.seed, "quality", "crop", index))
                seen[prompt, move] += 1
                right.append(move == prompt)
            rows.append({"right": float(np.mean(right))})
            self.on_step(f"crop {index + 1}: prompts")
        self.report.details["prompts_seen_as"] = _confusion(seen)
        return rows

    def control(self) -> list[Row]:
        """The same question asked of clips that are true, which says how good the question is."""
        rows, seen, profile = [], Counter(), self.session.profile
        for index in range(self.options.crops):
            prompt = prompt_of(index, len(self.photos))
            low = canonical_low(self.photos, profile, self.options.seed, index, canonical_motion(prompt))
            move = classify_low(low, profile)
            seen[prompt, move] += 1
            rows.append({"right": float(move == prompt)})
            self.on_step(f"crop {index + 1}: control")
        self.report.details["control_seen_as"] = _confusion(seen)
        return rows


def prompt_of(index: int, photos: int) -> str:
    """Crops go through the photographs; prompts go on by one more each time round, so that each meets all."""
    return list(CANONICAL)[(index % photos + index // photos) % len(CANONICAL)]


def _confusion(seen: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for (prompt, move), count in seen.items():
        table.setdefault(prompt, {})[move] = count
    return table


def _truth_panel(clip: TruthClip, upsampled: np.ndarray, frames: np.ndarray) -> Panel:
    columns = {"input": clip.frames[:1], "Stage I upsampled": upsampled, "Stage II": frames, "truth": clip.frames}
    return _panel(f"{clip.name}: {clip.prompt or '(no prompt)'}", columns)


def _panel(title: str, columns: dict[str, np.ndarray]) -> Panel:
    """First, middle and last frame of each column; the input has one."""
    frames = max(len(column) for column in columns.values())
    shown = [0, (frames - 1) // 2, frames - 1]
    return Panel(title, {name: [_at(column, t) for t in shown] for name, column in columns.items()})


def _at(column: np.ndarray, t: int) -> tuple[int, np.ndarray]:
    t = min(t, len(column) - 1)
    return t, column[t].copy()  # a view would keep the whole clip
