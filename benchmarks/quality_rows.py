"""One clip in, its sums out: what `quality_metrics` pools."""

from typing import Any, cast

import numpy as np

from ..engine.profile import Profile
from ..engine.vae import VAE
from ..runtime.models import Loaded
from ..runtime.session import Request, Session
from ..training.clips import low_factor
from .generation import Made, generate, round_trip, stage1_low, upsample_frames
from .measure import Row
from .metrics import (
    first_step,
    frame_error,
    gradient_energy,
    psnr,
    seam_sums,
    second_difference,
    segment_colours,
    squared_error,
    ssim,
)
from .optical_flow import classify, clip_flows, dynamic_degree
from .quality_clips import TruthClip, shrink
from .quality_metrics import finite


def dynamic(low: np.ndarray, profile: Profile) -> float:
    """Dynamic degree of low-resolution frames, in their pixels a frame."""
    return dynamic_degree(clip_flows(low, profile.block_frames), profile.block_frames)


def truth_row(loaded: Loaded, clip: TruthClip, made: Made) -> Row:
    """What a clip made from the truth's own motion shares with the truth."""
    profile, every = loaded.profile, loaded.profile.block_frames
    factor, truth = low_factor(profile), clip.frames
    vae1, vae2 = (cast(VAE, loaded.modules[name]) for name in ("vae1", "vae2"))
    true_low = upsample_frames(clip.low, profile.height, profile.width)
    error, count = squared_error(made.frames, truth)
    low_error, low_count = squared_error(round_trip(vae1, clip.low), clip.low)
    return {
        "stage2_error": error,
        "count": count,
        "bicubic_error": squared_error(made.upsampled, truth)[0],
        "true_low_error": squared_error(true_low, truth)[0],
        "vae_error": squared_error(round_trip(vae2, truth), truth)[0],
        "vae1_error": low_error,
        "low_count": low_count,
        "transition_error": squared_error(made.low, clip.low)[0],
        "stage2_ssim": ssim(made.frames, truth, every),
        "bicubic_ssim": ssim(made.upsampled, truth, every),
        "stage2_gradient": gradient_energy(made.frames),
        "bicubic_gradient": gradient_energy(made.upsampled),
        "truth_gradient": gradient_energy(truth),
        "stage2_flicker": second_difference(made.frames),
        "truth_flicker": second_difference(truth),
        "stage2_dynamic": dynamic(shrink(made.frames, factor), profile),
        "truth_dynamic": dynamic(clip.low, profile),
    }


def describe_truth(clip: TruthClip, row: Row) -> dict[str, Any]:
    """One clip in words and decibels: where Stage I strayed from the truth, nobody after it can win."""
    counts = {"stage2": "count", "bicubic": "count", "transition": "low_count"}
    decibels = {f"{name}_psnr_db": finite(psnr(row[f"{name}_error"], row[count])) for name, count in counts.items()}
    return {"name": clip.name, "prompt": clip.prompt, **decibels}


def generated_row(profile: Profile, image: np.ndarray, made: Made) -> Row:
    """What a clip shows by itself; there is no truth for what the models make up."""
    error, count = frame_error(made.first, image)
    return {
        "seams": seam_sums(made.frames, profile),
        "stage1_seams": seam_sums(made.upsampled, profile),
        "first_error": error,
        "first_count": count,
        "first_step": first_step(made.frames, profile.block_frames),
        "colours": segment_colours(made.frames, profile),
        "stage1_colours": segment_colours(made.upsampled, profile),
        "dynamic": dynamic(shrink(made.frames, low_factor(profile)), profile),
    }


def make_generated(session: Session, image: np.ndarray, prompt: str, seed: int) -> tuple[Row, Made]:
    """A clip by both stages, and its sums."""
    made = generate(session, Request(image, prompt, seed=seed))
    return generated_row(session.profile, image, made), made


def seen_move(session: Session, image: np.ndarray, prompt: str, seed: int) -> str:
    """The camera move that Stage I's clip shows."""
    return classify_low(stage1_low(session, Request(image, prompt, seed=seed)), session.profile)


def classify_low(low: np.ndarray, profile: Profile) -> str:
    """The camera move of low-resolution frames uint8 [T, h, w, 3]."""
    return classify(clip_flows(low, profile.block_frames), profile.block_frames)
