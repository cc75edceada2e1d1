"""Plots of records: how the time of Stage II grows with the clip, in segments and as one window."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import MediaError
from .library import library

COLOURS = {"segments": "#2f7f5f", "full-sequence": "#c2502e"}
LABELS = {"segments": "in segments (CSG)", "full-sequence": "one window of all blocks"}


def plot_lengths(record: Mapping[str, Any], path: Path) -> None:
    """Write a PNG or SVG of a record of `length` or `full-sequence`. Times are relative to the shortest in segments.

    EnvironmentMismatch without matplotlib, MediaError for a record without lengths.
    """
    if "lengths" not in record:
        raise MediaError(f"plot: got a record of {record['case']}, want one of length or full-sequence; pass that")
    library("matplotlib").use("Agg")
    pyplot = library("matplotlib.pyplot")
    points = record["lengths"]["points"]
    unit = min(float(np.median(point["denoise"])) for point in points if point["way"] == "segments")
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for way in dict.fromkeys(point["way"] for point in points):
        own = [point for point in points if point["way"] == way]
        frames = [point["frames"] for point in own]
        runs = [np.asarray(point["denoise"]) / unit for point in own]
        exponent = record["lengths"]["growth"].get(way, {}).get("denoise_growth_exponent")
        label = LABELS[way] if exponent is None else f"{LABELS[way]}: frames^{exponent:.2f}"
        axes.plot(frames, [np.median(run) for run in runs], "o-", color=COLOURS[way], label=label)
        axes.vlines(frames, [run.min() for run in runs], [run.max() for run in runs], color=COLOURS[way])
    axes.set(xlabel="frames", ylabel="time of denoising, shortest = 1", ylim=(0, None))
    axes.set_xticks(sorted({point["frames"] for point in points}))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    part = path.with_name(path.name + ".part")
    try:
        figure.savefig(part, format=path.suffix.lstrip(".") or "png", dpi=120)
        part.replace(path)
    except (OSError, ValueError) as error:
        raise MediaError(f"plot {path}: got '{error}', want a .png or .svg in a writable folder; check it") from error
    finally:
        part.unlink(missing_ok=True)
        pyplot.close(figure)
