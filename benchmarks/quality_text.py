"""Numbers of the report as words, the same on the terminal and on the page."""

import math

from .ablations import AblationResult
from .quality_metrics import Result

HEADER = ("metric", "value", "95 % interval", "clips", "gate", "result")
ABLATION_HEADER = ("variant", "PSNR dB", "change dB", "SSIM", "sharpness / truth", "seam ratio", "seconds", "peak MB")
ABLATION_KEYS = ("psnr_db", "psnr_change_db", "ssim", "sharpness_over_truth", "seam_ratio", "seconds")


def number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "inf" if value == math.inf else "-"


def interval(low: float, high: float) -> str:
    return "-" if math.isnan(low) or math.isnan(high) else f"{number(low)} to {number(high)}"


def metric_cells(result: Result) -> tuple[str, ...]:
    """One row of the table; a gate is followed by its verdict and by how much it is kept or missed."""
    metric, estimate = result.metric, result.estimate
    gate, verdict = "", result.verdict
    if metric.gate is not None:
        gate = str(metric.gate)
        margin = metric.gate.margin(estimate.value)
        if math.isnan(margin):
            verdict += ", not measured"
        elif math.isfinite(margin):
            verdict += f" by {number(abs(margin))}"
    value = f"{number(estimate.value)} {metric.unit}".strip()
    return metric.label, value, interval(estimate.low, estimate.high), str(estimate.count), gate, verdict


def ablation_cells(result: AblationResult) -> tuple[str, ...]:
    """One row of the ablation table."""
    if result.refused:
        return (result.name, *["-"] * (len(ABLATION_HEADER) - 2), "refused")
    cells = []
    for key in ABLATION_KEYS:
        value, low, high = result.values[key]
        between = interval(low, high)
        cells.append(number(value) if between == "-" else f"{number(value)} ({between})")
    peak = "-" if result.peak_bytes is None else f"{result.peak_bytes / 1e6:,.0f}"
    return (result.name, *cells, peak)
