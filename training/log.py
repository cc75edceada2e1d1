"""The log of a training and the picture of its loss."""

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..engine.errors import EnvironmentMismatch, SwiftError

LOG, CURVE = "log.jsonl", "loss.png"
Record = dict[str, Any]


class TrainingError(SwiftError):
    """A training that cannot start or go on as asked."""


def read_log(folder: Path) -> list[Record]:
    """The records of a training folder; a last line that a crash cut short is left out."""
    path = folder / LOG
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = []
    for index, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if index + 1 == len(lines):
                break
            raise TrainingError(
                f"{path}: got a line {index + 1} that is not JSON, want one record a line; repair or delete the file"
            ) from error
    return records


def draw_curve(folder: Path, figures: Any = None) -> Path:
    """Draw loss.png from the log: every logged loss, and their running mean, on a log scale."""
    figures = figures or curve_figures()
    points = [(r["step"], r["loss"]) for r in read_log(folder) if r["loss"] is not None and r["loss"] > 0]
    figure = figures(figsize=(8, 4.5), dpi=100, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
    if points:
        steps, losses = zip(*points, strict=True)
        window, sums = max(5, len(losses) // 20), [0.0, *accumulate(losses)]
        means = [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]
        axes.plot(steps, losses, color="0.75", linewidth=0.8, label="logged")
        axes.plot(steps, means, color="tab:blue", linewidth=1.8, label=f"mean of {window}")
        axes.set_title(f"step {steps[-1]}: {means[-1]:.4g}")
        axes.legend()
    axes.grid(True, which="both", alpha=0.3)
    part = folder / (CURVE + ".part")
    figure.savefig(part, format="png")
    return part.replace(folder / CURVE)


def curve_figures() -> Any:
    """matplotlib's figure class, whose default canvas is Agg."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EnvironmentMismatch(
            "loss curve: got no matplotlib, want it; pip install 'swifti2v[train]' (from a checkout: '.[train]'), "
            "or train without the curve (--set curve=false)"
        ) from error
    return Figure
