"""What each part of segment-wise generation is worth: the same weights run in other ways, on the same clips."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..engine.errors import ProfileError
from ..engine.profile import Profile
from ..runtime.models import Loaded
from ..runtime.session import Request, Session
from .generation import generate
from .measure import Row, Rows, bootstrap
from .metrics import gradient_energy, psnr, seam_ratio, seam_sums, squared_error, ssim
from .quality_clips import TruthClip
from .quality_metrics import finite

NOTE = (
    "All variants run on the same weights, trained with M around 3, N around 1, context both ways and the reference "
    "on; another training could suit a variant better. Change is to the default on the same clips and noise. Seconds "
    "and peak memory are of Stage II (reference, denoising, decoding) per clip; memory is the device's on CUDA, "
    "elsewhere all that is resident of the process. Two trainings, as with stage transition and without, are compared "
    "by --compare."
)
MORE_STEPS = 4  # times as many: what distillation could at most bring, as it teaches few steps to do what many do


@dataclass
class Variant:
    """One way to run Stage II, or another DiT for it. `refused` says why the profile cannot; then there are no rows."""

    name: str
    profile: Profile | None
    refused: str = ""
    stage2: nn.Module | None = None  # in place of the profile's own
    rows: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class AblationResult:
    """A variant's numbers by key, as (value, low, high)."""

    name: str
    values: dict[str, tuple[float, float, float]]
    peak_bytes: int | None
    refused: str = ""

    def as_json(self) -> dict[str, Any]:
        if self.refused:
            return {"name": self.name, "refused": self.refused}
        shown = {
            key: {"mean": finite(value), "interval": [finite(low), finite(high)]}
            for key, (value, low, high) in self.values.items()
        }
        return {"name": self.name, **shown, "peak_bytes": self.peak_bytes}


def plan_variants(profile: Profile, others: Mapping[str, nn.Module] | None = None) -> list[Variant]:
    """The profile itself, then what differs from it in one thing; last, `others` in place of its second DiT."""
    changes: list[tuple[str, dict[str, Any]]] = [("default", {})]
    other = "one-way" if profile.context == "both" else "both"
    changes.append((f"context {other}", {"context": other}))
    changes += [(f"N = {n}", {"neighbours": n}) for n in (0, 1, 2) if n != profile.neighbours]
    changes += [(f"M = {m}", {"noisy": m}) for m in (1, 3, 5) if m != profile.noisy]
    changes.append(("context reused", {"reuse_context": True}))
    changes.append(("reference off", {"reference": False}))
    changes.append(("full sequence", {"noisy": profile.blocks - 1, "neighbours": 0}))
    variants = []
    for name, change in changes:
        try:
            variants.append(Variant(name, replace(profile, **change)))
        except ProfileError as error:
            variants.append(Variant(name, None, str(error)))
    more = MORE_STEPS * profile.stage2.steps
    variants.append(Variant(f"{more} steps", profile.override(stage2_steps=more)))
    return variants + [Variant(name, profile, stage2=module) for name, module in (others or {}).items()]


def run_variants(loaded: Loaded, variants: Sequence[Variant], clip: TruthClip, motion: Tensor) -> None:
    """Make one clip in every variant, from the same motion and noise, and add its row."""
    base: float | None = None
    for variant in variants:
        if variant.profile is None:
            continue
        modules = loaded.modules if variant.stage2 is None else loaded.modules | {"stage2": variant.stage2}
        with Session.open(replace(loaded, profile=variant.profile, modules=modules)) as session:
            made = generate(session, Request(clip.frames[0], clip.prompt, seed=clip.seed), motion)
        error, count = squared_error(made.frames, clip.frames)
        base = error if base is None else base
        row: Row = {
            "error": error,
            "base": base,
            "count": count,
            "ssim": ssim(made.frames, clip.frames, variant.profile.block_frames),
            "gradient": gradient_energy(made.frames),
            "truth_gradient": gradient_energy(clip.frames),
            "seams": seam_sums(made.frames, variant.profile),
            "seconds": made.cost.seconds,
            "peak": np.nan if made.cost.peak_bytes is None else made.cost.peak_bytes,
        }
        variant.rows.append(row)


def _change(rows: Rows) -> float:
    return psnr(rows["error"], rows["count"]) - psnr(rows["base"], rows["count"])


STATISTICS = {
    "psnr_db": lambda rows: psnr(rows["error"], rows["count"]),
    "psnr_change_db": _change,  # to the default on the same clips
    "ssim": lambda rows: float(rows["ssim"].mean()),
    "sharpness_over_truth": lambda rows: float(rows["gradient"].sum() / rows["truth_gradient"].sum()),
    "seam_ratio": lambda rows: seam_ratio(rows["seams"]),
    "seconds": lambda rows: float(rows["seconds"].mean()),
}


def variant_results(variants: Sequence[Variant], seed: int) -> list[AblationResult]:
    """Every variant's numbers with intervals over clips, and its highest peak memory."""
    results = []
    for variant in variants:
        estimates = {key: bootstrap(variant.rows, statistic, seed) for key, statistic in STATISTICS.items()}
        peaks = np.array([row["peak"] for row in variant.rows], dtype=np.float64)
        peak = None if not len(peaks) or np.isnan(peaks).any() else int(peaks.max())
        values = {key: (item.value, item.low, item.high) for key, item in estimates.items()}
        results.append(AblationResult(variant.name, values, peak, variant.refused))
    return results
