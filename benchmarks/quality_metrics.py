"""The table of quality metrics: how each is pooled from the clips' sums, and the gate it must pass."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .measure import Estimate, Row, Rows, Statistic, bootstrap
from .metrics import block_pulse, colour_drift, psnr, seam_ratio

Group = Literal["truth", "moving", "static", "generated", "following", "control"]


@dataclass(frozen=True)
class Gate:
    """Bounds of a metric, which they are part of unless `open`."""

    least: float = -math.inf
    most: float = math.inf
    open: bool = False

    def margin(self, value: float) -> float:
        """How far inside the bounds; negative is how far outside, NaN is not measured."""
        return min(value - self.least, self.most - value)

    def passed(self, value: float) -> bool:
        margin = self.margin(value)
        return margin > 0 if self.open else margin >= 0

    def __str__(self) -> str:
        if math.isinf(self.least):
            return f"{'<' if self.open else '<='} {self.most:g}"
        return f">= {self.least:g}" if math.isinf(self.most) else f"{self.least:g} to {self.most:g}"


@dataclass(frozen=True)
class Metric:
    """A number of the report: its key, words for it, unit, the clips it is over, and how it is pooled."""

    key: str
    label: str
    unit: str
    group: Group
    statistic: Statistic
    gate: Gate | None = None


@dataclass(frozen=True)
class Result:
    """A measured metric."""

    metric: Metric
    estimate: Estimate

    @property
    def verdict(self) -> str:
        """PASS, miss, or nothing where there is no gate. Without a number a gate is missed."""
        gate = self.metric.gate
        return "" if gate is None else "PASS" if gate.passed(self.estimate.value) else "miss"

    def as_json(self) -> dict[str, Any]:
        """Plain values; what is not a finite number is null."""
        estimate, gate = self.estimate, self.metric.gate
        shown: dict[str, Any] = {
            "mean": finite(estimate.value),
            "interval": [finite(estimate.low), finite(estimate.high)],
            "clips": estimate.count,
            "unit": self.metric.unit,
            "label": self.metric.label,
        }
        if gate is not None:
            margin = finite(gate.margin(estimate.value))
            shown["gate"] = {"want": str(gate), "passed": gate.passed(estimate.value), "margin": margin}
        return shown


def finite(value: float) -> float | None:
    """The number, None for what JSON cannot hold."""
    return float(value) if math.isfinite(value) else None


def _psnr(name: str) -> Statistic:
    return lambda rows: psnr(rows[f"{name}_error"], rows["count"])


def _mean(name: str) -> Statistic:
    return lambda rows: float(rows[name].mean())


def _ratio(above: str, below: str) -> Statistic:
    return lambda rows: float(rows[above].sum() / rows[below].sum())


def _pooled(pool: Callable[[np.ndarray], float], name: str) -> Statistic:
    return lambda rows: pool(rows[name])


def _gain(rows: Rows) -> float:
    return psnr(rows["stage2_error"], rows["count"]) - psnr(rows["bicubic_error"], rows["count"])


def _first_step(rows: Rows) -> float:
    step, neighbours = rows["first_step"].sum(0)
    return float(step / neighbours)


TRUTH = (
    Metric("psnr_gain_db", "Stage II over bicubic, PSNR", "dB", "truth", _gain, Gate(least=2.0)),
    Metric("psnr_db", "Stage II, PSNR", "dB", "truth", _psnr("stage2")),
    Metric("bicubic_psnr_db", "bicubic of the same low clip, PSNR", "dB", "truth", _psnr("bicubic")),
    Metric("true_low_psnr_db", "bicubic of the true low clip, PSNR", "dB", "truth", _psnr("true_low")),
    Metric("vae_psnr_db", "VAE of Stage II, round trip of the truth, PSNR", "dB", "truth", _psnr("vae")),
    Metric(
        "transition_psnr_db", "low clip after stage transition against the true one, PSNR", "dB", "truth",
        lambda rows: psnr(rows["transition_error"], rows["low_count"]),
    ),
    Metric(
        "vae1_psnr_db", "VAE of Stage I, round trip of the low truth, PSNR", "dB", "truth",
        lambda rows: psnr(rows["vae1_error"], rows["low_count"]),
    ),
    Metric("ssim", "Stage II, SSIM", "", "truth", _mean("stage2_ssim")),
    Metric("bicubic_ssim", "bicubic, SSIM", "", "truth", _mean("bicubic_ssim")),
    Metric(
        "sharpness_over_bicubic", "gradient energy over bicubic's", "x", "truth",
        _ratio("stage2_gradient", "bicubic_gradient"), Gate(least=2.0),
    ),
    Metric(
        "sharpness_over_truth", "gradient energy over the truth's", "x", "truth",
        _ratio("stage2_gradient", "truth_gradient"), Gate(0.75, 1.25),
    ),
    Metric("flicker", "flicker over the truth's", "x", "truth", _ratio("stage2_flicker", "truth_flicker")),
    Metric("dynamic_degree", "dynamic degree of Stage II", "px/frame", "truth", _mean("stage2_dynamic")),
    Metric("dynamic_degree_truth", "dynamic degree of the truth", "px/frame", "truth", _mean("truth_dynamic")),
)  # fmt: skip
GENERATED = (
    Metric(
        "seam_ratio", "seam ratio", "x", "generated", _pooled(seam_ratio, "seams"), Gate(most=1.1)
    ),
    Metric(
        "seam_ratio_static", "the same of static scenes alone, where a seam shows most", "x", "static",
        _pooled(seam_ratio, "seams"),
    ),
    Metric(
        "seam_ratio_stage1", "the same of Stage I upsampled, which has no seams", "x", "generated",
        _pooled(seam_ratio, "stage1_seams"),
    ),
    Metric(
        "block_pulse", "step from one latent block to the next over its neighbours", "x", "generated",
        _pooled(block_pulse, "seams"),
    ),
    Metric(
        "block_pulse_stage1", "the same of Stage I upsampled", "x", "generated",
        _pooled(block_pulse, "stage1_seams"),
    ),
    Metric(
        "first_frame_psnr_db", "decoded frame 0 against the image, PSNR", "dB", "generated",
        lambda rows: psnr(rows["first_error"], rows["first_count"]), Gate(least=30.0),
    ),
    Metric(
        "first_step_ratio", "step from the image to frame 1 over its neighbours", "x", "generated", _first_step,
        Gate(most=1.5),
    ),
    Metric(
        "colour_drift_levels", "colour drift last against first segment, static scenes", "/255", "static",
        _pooled(colour_drift, "colours"), Gate(most=1.0, open=True),
    ),
    Metric(
        "colour_drift_stage1_levels", "the same of Stage I upsampled", "/255", "static",
        _pooled(colour_drift, "stage1_colours"),
    ),
    Metric("dynamic_degree_moving", "dynamic degree, moving scenes", "px/frame", "moving", _mean("dynamic")),
    Metric("dynamic_degree_static", "dynamic degree, static scenes", "px/frame", "static", _mean("dynamic")),
    Metric(
        "prompt_following", "basic camera moves told apart, Stage I", "", "following", _mean("right"), Gate(least=0.9)
    ),
    Metric(
        "prompt_following_control", "the same on true clips", "", "control", _mean("right"), Gate(least=0.95)
    ),
)  # fmt: skip


def evaluate(metrics: Sequence[Metric], rows: dict[Group, list[Row]], seed: int) -> list[Result]:
    """Every metric over the rows of its group."""
    return [Result(metric, bootstrap(rows.get(metric.group, []), metric.statistic, seed)) for metric in metrics]


def drift_metrics(segments: int) -> list[Metric]:
    """How far the colour of each segment is from the first one's, as `colour_drift` says it of the last."""

    def until(last: int) -> Statistic:
        return lambda rows: colour_drift(rows["colours"][:, : last + 1])

    label = "colour drift of segment {} against the first, static scenes"
    return [
        Metric(f"colour_drift_segment_{last + 1}_levels", label.format(last + 1), "/255", "static", until(last))
        for last in range(1, segments - 1)
    ]
