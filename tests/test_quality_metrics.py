"""Each quality metric on clips whose answer is known by hand, the bootstrap, the gates, the cost of a piece of work."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from swifti2v.benchmarks.measure import Row, bootstrap, measured, resident_bytes
from swifti2v.benchmarks.metrics import (
    block_pulse,
    boundaries,
    colour_drift,
    first_step,
    frame_error,
    gradient_energy,
    psnr,
    seam_ratio,
    seam_sums,
    second_difference,
    segment_colours,
    squared_error,
    ssim,
    steps,
)
from swifti2v.benchmarks.quality_metrics import GENERATED, TRUTH, Gate, Metric, Result, drift_metrics, evaluate
from swifti2v.benchmarks.quality_text import metric_cells
from swifti2v.engine.profile import Profile


def grey(levels, size: tuple[int, int] = (8, 12)) -> np.ndarray:
    """A clip of uniform frames of these levels, uint8 [T, h, w, 3]."""
    return np.broadcast_to(np.array(levels, dtype=np.uint8)[:, None, None, None], (len(levels), *size, 3)).copy()


def noisy_clip(seed: int, frames: int = 9, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), dtype=np.uint8)


def metric(key: str) -> Metric:
    return next(item for item in (*TRUTH, *GENERATED) if item.key == key)


def test_psnr_is_of_frames_after_the_image():
    truth, made = grey([100] * 5), grey([0, 105, 95, 105, 95])  # 5 levels off everywhere, frame 0 is not looked at
    error, count = squared_error(made, truth)
    assert (error, count) == (25 * count, 4 * 8 * 12 * 3)
    assert psnr(error, count) == pytest.approx(20 * math.log10(255 / 5))
    assert frame_error(made[0], truth[0]) == (100**2 * 8 * 12 * 3, 8 * 12 * 3)


def test_differences_do_not_wrap_around():
    black, white = grey([0, 0]), grey([0, 255])
    assert psnr(*squared_error(white, black)) == pytest.approx(0)
    assert steps(white).tolist() == [255]


def test_psnr_pools_errors_and_not_decibels():
    rows: list[Row] = [{"stage2_error": 1.0, "count": 1}, {"stage2_error": 99.0, "count": 1}]
    pooled = evaluate([metric("psnr_db")], {"truth": rows}, 0)[0].estimate.value
    assert pooled == pytest.approx(10 * math.log10(255**2 / 50))


def test_gain_and_its_gate():
    rows: list[Row] = [{"stage2_error": 100.0, "bicubic_error": 200.0, "count": 10}] * 3
    result = evaluate([metric("psnr_gain_db")], {"truth": rows}, 0)[0]
    assert result.estimate.value == pytest.approx(10 * math.log10(2))
    assert result.verdict == "PASS"
    assert metric_cells(result)[-1] == "PASS by 1.010"
    worse = evaluate([metric("psnr_gain_db")], {"truth": [{**rows[0], "stage2_error": 150.0}]}, 0)[0]
    assert worse.verdict == "miss"
    assert worse.as_json()["gate"]["margin"] == pytest.approx(10 * math.log10(200 / 150) - 2)


def test_gradient_energy_of_a_blurred_wave_falls_by_the_transfer_of_the_blur():
    x = np.arange(66)
    for period in (4, 8):
        wave = 128 + 100 * np.sin(2 * np.pi * x / period + 0.3)
        blurred = (wave[1:] + wave[:-1]) / 2  # the mean of two neighbours: |transfer| = cos(pi / period)
        sharp, soft = (
            np.broadcast_to(np.rint(row)[None, None, :, None], (3, 16, 65, 3)).astype(np.uint8)
            for row in (wave[1:], blurred)
        )  # 64 differences, whole periods
        expected = math.cos(math.pi / period) ** 2
        assert gradient_energy(soft) / gradient_energy(sharp) == pytest.approx(expected, rel=0.02)
        turned = gradient_energy(sharp.transpose(0, 2, 1, 3))
        assert turned == pytest.approx(gradient_energy(sharp), rel=1e-5)


def test_gradient_energy_of_a_ramp_in_both_directions():
    y, x = np.mgrid[0:10, 0:10]
    ramp = np.repeat((3 * x + 4 * y)[None, :, :, None], 3, axis=3).astype(np.uint8)  # [1, 10, 10, 3]
    assert gradient_energy(np.concatenate((ramp * 0, ramp))) == pytest.approx(9 + 16)


def test_flicker_sees_alternation_but_no_steady_change_and_not_the_image():
    assert second_difference(grey([250, 10, 20, 30, 40])) == 0
    assert second_difference(grey([250, 100, 110, 100, 110])) == 20


def test_ssim_is_one_for_equal_clips_and_falls_with_noise():
    clip = noisy_clip(1)
    noise = np.random.default_rng(2).integers(-30, 31, clip.shape)
    other = np.clip(clip.astype(int) + noise, 0, 255).astype(np.uint8)
    assert ssim(clip, clip, 4) == pytest.approx(1)
    assert 0.5 < ssim(other, clip, 4) < 0.99
    spoiled = clip.copy()
    spoiled[[0, 1, 2, 3, 5, 6, 7]] = 0  # frames that are not looked at
    assert ssim(spoiled, clip, 4) == pytest.approx(1)


def test_boundaries_are_the_steps_between_blocks(tiny: Profile):
    assert boundaries(tiny) == ([12, 24], [4, 8, 16, 20, 28])  # 9 blocks, M = 3
    assert boundaries(replace(tiny, noisy=8, neighbours=0))[0] == []
    assert boundaries(replace(tiny, noisy=1))[1] == []


def planted(profile: Profile, jumps: dict[int, int], base: int = 1) -> np.ndarray:
    """A grey clip that changes by these levels at these steps, and by `base` at all others."""
    change = [jumps.get(t, base) for t in range(profile.frames - 1)]
    return grey(np.cumsum([10, *change]))


def test_seam_ratio_is_of_what_is_planted(tiny: Profile):
    between, within = boundaries(tiny)
    even = planted(tiny, dict.fromkeys(between, 3) | dict.fromkeys(within, 2) | {0: 90, 14: 50})
    np.testing.assert_allclose(seam_sums(even, tiny), [6, 2, 10, 5], rtol=3e-3)
    assert seam_ratio(seam_sums(even, tiny)[None]) == pytest.approx(1.5, rel=3e-3)
    fast = planted(tiny, dict.fromkeys(between, 6) | dict.fromkeys(within, 4), base=2)
    assert seam_ratio(seam_sums(fast, tiny)[None]) == pytest.approx(1.5, rel=3e-3)
    np.testing.assert_allclose(seam_sums(grey([100] * tiny.frames), tiny), [2, 2, 5, 5])
    hidden = planted(tiny, dict.fromkeys(between, 2) | dict.fromkeys(within, 4))
    both = np.stack((seam_sums(even, tiny), seam_sums(hidden, tiny)))
    assert block_pulse(seam_sums(even, tiny)[None]) == pytest.approx(16 / 7, rel=3e-3)
    assert block_pulse(seam_sums(grey([100] * tiny.frames), tiny)[None]) == pytest.approx(1)
    assert seam_ratio(both) == pytest.approx((10 / 4) / (30 / 10), rel=3e-3)  # sums are pooled, not ratios


def test_seam_ratio_without_one_of_the_kinds_is_not_a_number_and_a_miss(tiny: Profile):
    single = replace(tiny, noisy=1)
    rows: list[Row] = [{"seams": seam_sums(planted(single, {4: 1, 8: 2}), single)}] * 2
    result = evaluate([metric("seam_ratio")], {"generated": rows}, 0)[0]
    assert math.isnan(result.estimate.value)
    assert result.verdict == "miss"
    assert metric_cells(result)[-1] == "miss, not measured"
    assert result.as_json()["mean"] is None


def test_first_step_is_compared_with_the_others_of_its_block():
    step = first_step(grey([10, 16, 18, 20, 22, 99]), 4)
    assert step.tolist() == [6, 2]
    rows: list[Row] = [{"first_step": step}, {"first_step": np.array([2.0, 2.0])}]
    result = evaluate([metric("first_step_ratio")], {"generated": rows}, 0)[0]
    assert result.estimate.value == 2
    assert result.verdict == "miss"


def test_colour_drift_is_the_worst_channel_and_does_not_cancel(tiny: Profile):
    clip = grey([100] * tiny.frames)
    clip[0] = 255  # the image is no part of a segment
    up, down = clip.copy(), clip.copy()
    up[25:, :, :, 1] += 2  # the last of three segments, blocks 7 and 8
    down[25:, :, :, 1] -= 2
    colours = np.array([segment_colours(c, tiny) for c in (up, down)])
    assert colours.shape == (2, 3, 3)
    assert colours[0, 0].tolist() == [100, 100, 100]
    assert colour_drift(colours) == 2
    [second] = evaluate(drift_metrics(3), {"static": [{"colours": c} for c in colours]}, 0)
    assert (second.metric.key, second.estimate.value) == ("colour_drift_segment_2_levels", 0)
    assert not Gate(most=1.0, open=True).passed(1.0)


@pytest.mark.parametrize(
    ("gate", "inside", "outside", "text"),
    [
        (Gate(least=2), (2.0, 3.0), (1.999, -math.inf, math.nan), ">= 2"),
        (Gate(most=1.1), (1.1, 0.2), (1.1001, math.inf, math.nan), "<= 1.1"),
        (Gate(0.75, 1.25), (0.75, 1.0, 1.25), (0.749, 1.251, math.nan), "0.75 to 1.25"),
        (Gate(most=1, open=True), (0.999,), (1.0, math.nan), "< 1"),
    ],
)
def test_gates(gate: Gate, inside: tuple[float, ...], outside: tuple[float, ...], text: str):
    assert all(gate.passed(value) for value in inside)
    assert not any(gate.passed(value) for value in outside)
    assert str(gate) == text


def test_the_gates_are_those_that_were_promised():
    gates = {item.key: str(item.gate) for item in (*TRUTH, *GENERATED) if item.gate is not None}
    assert gates == {
        "psnr_gain_db": ">= 2",
        "sharpness_over_bicubic": ">= 2",
        "sharpness_over_truth": "0.75 to 1.25",
        "seam_ratio": "<= 1.1",
        "colour_drift_levels": "< 1",
        "first_frame_psnr_db": ">= 30",
        "first_step_ratio": "<= 1.5",
        "prompt_following": ">= 0.9",
        "prompt_following_control": ">= 0.95",
    }


def mean_of(rows) -> float:
    return float(rows["x"].mean())


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        found = bootstrap([{"x": x} for x in generator.normal(5, 2, 30)], mean_of, seed=trial, resamples=300)
        covered += found.low <= 5 <= found.high
    assert 0.88 <= covered / 200 <= 0.98  # 95 %, less a little for 30 samples


def test_the_interval_is_of_the_pooled_statistic_and_seeded():
    rows: list[Row] = [{"x": 1.0 + k, "y": 10.0 - k} for k in range(9)]

    def ratio(stacked) -> float:
        return stacked["x"].sum() / stacked["y"].sum()

    found = bootstrap(rows, ratio, seed=3)
    assert found.value == pytest.approx(45 / 54)
    assert 0.1 < found.low < found.value < found.high < 4.5
    assert found == bootstrap(rows, ratio, seed=3)
    assert found != bootstrap(rows, ratio, seed=4)


def test_one_clip_has_no_interval_and_none_no_value():
    one = bootstrap([{"x": 4.0}], mean_of)
    assert (one.value, one.count) == (4, 1)
    assert math.isnan(one.low)
    assert math.isnan(bootstrap([], mean_of).value)
    shown = Result(metric("ssim"), one).as_json()
    assert shown["interval"] == [None, None]


@pytest.mark.skipif(resident_bytes() is None, reason="this system does not say how much memory a process has")
def test_cost_is_of_what_runs_inside():
    cpu = torch.device("cpu")
    with measured(cpu) as before:
        pass
    with measured(cpu) as cost:
        held = np.ones(100_000_000, dtype=np.uint8)
    del held
    with measured(cpu) as after:
        pass
    assert before.peak_bytes is not None
    assert cost.peak_bytes is not None
    assert after.peak_bytes is not None
    assert cost.peak_bytes - before.peak_bytes > 90_000_000
    assert cost.peak_bytes - after.peak_bytes > 90_000_000
    assert cost.seconds > 0
