"""Plots of records: how denoising grows with the clip, in segments and as one window."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import MediaError
from .library import library

COLOURS = {"segments": "#2f7f5f", "full-sequence": "#c2502e"}
LABELS = {"segments": "in segments (CSG)", "full-sequence": "one window of all blocks"}


def plot_lengths(record: Mapping[str, Any], path: Path) -> None:
    """Write a PNG or SVG of a record of `length` or `full-sequence`: denoising, as a whole and a frame.

    EnvironmentMismatch without matplotlib, MediaError for a record without lengths.
    """
    if "lengths" not in record:
        raise MediaError(f"plot: got a record of {record['case']}, want one of length or full-sequence; pass that")
    library("matplotlib").use("Agg")
    pyplot = library("matplotlib.pyplot")
    points = record["lengths"]["points"]
    figure, (whole, each) = pyplot.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    for way in dict.fromkeys(point["way"] for point in points):
        own = [point for point in points if point["way"] == way]
        frames = np.array([point["frames"] for point in own])
        runs = np.array([point["denoise"] for point in own])  # [lengths, runs]
        exponent = record["lengths"]["growth"].get(way, {}).get("denoise_growth_exponent")
        label = LABELS[way] if exponent is None else f"{LABELS[way]}: frames^{exponent:.2f}"
        for axes, values in ((whole, runs), (each, 1000 * runs / frames[:, None])):
            axes.plot(frames, np.median(values, axis=1), "o-", color=COLOURS[way], label=label)
            axes.vlines(frames, values.min(axis=1), values.max(axis=1), color=COLOURS[way])
    profile = record["profile"]
    steps = len(profile["sigmas"]["stage2"])
    figure.suptitle(
        f"Denoising, {profile['name']} at {profile['size'][0]}x{profile['size'][1]}, steps: {steps}, "
        f"clock: {record['timer']['clock']}{'' if record.get('complete', True) else ', incomplete'}",
        fontsize="medium",
    )
    whole.set(xlabel="frames", ylabel="seconds a clip", ylim=(0, None))
    each.set(xlabel="frames", ylabel="milliseconds a frame", ylim=(0, None))
    for axes in (whole, each):
        axes.set_xticks(sorted({point["frames"] for point in points}))
        axes.grid(alpha=0.3)
    each.legend(frameon=False, loc="upper left")  # where a rising line leaves room
    _save(figure, path)
    pyplot.close(figure)


def _save(figure: Any, path: Path) -> None:
    """Write a figure so that it appears whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        figure.savefig(part, format=path.suffix.lstrip(".") or "png", dpi=120)
        part.replace(path)
    except (OSError, ValueError) as error:
        raise MediaError(f"plot {path}: got '{error}', want a .png or .svg in a writable folder; check it") from error
    finally:
        part.unlink(missing_ok=True)
