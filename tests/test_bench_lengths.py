"""How Stage II grows with the clip: fits on known curves, and denoising alone against what a clip calls."""

from collections import Counter

import pytest
import torch

from swifti2v.benchmarks.clock import Samples, Timing
from swifti2v.benchmarks.flops import clip_calls
from swifti2v.benchmarks.lengths import LengthPoint, growth_json, growth_words, length_points, length_profile
from swifti2v.benchmarks.models import open_models
from swifti2v.benchmarks.variants import Variant, eager_variant
from swifti2v.engine.presets import get_profile
from swifti2v.engine.profile import Profile


def point(way: str, frames: int, segments: int, seconds: float, operations: int) -> LengthPoint:
    return LengthPoint(way, frames, segments, 5, operations, operations, (seconds,), Samples(seconds, [seconds]))


def test_a_square_is_told_from_a_line():
    lengths = (13, 25, 49, 97)
    square = [point("full-sequence", n, 1, (n - 1) ** 2 / 100, (n - 1) ** 2) for n in lengths]
    line = [point("segments", n, (n - 1) // 12, 0.3 * (n - 1) / 12 - 0.05, n - 1) for n in lengths]
    one, other = growth_json(square), growth_json(line)
    assert one["denoise_growth_between"] == pytest.approx([2, 2, 2])
    assert one["operations_growth_exponent"] == pytest.approx(2)
    assert one["denoise_from_a_line"] > 0.5
    assert other["denoise_from_a_line"] < 1e-9, "a shorter first window is an intercept, no bend"
    assert other["operations_growth_exponent"] == pytest.approx(1)
    assert "frames^2.00" in growth_words(one)
    assert "% from a line at most" in growth_words(other)


def test_an_exponent_says_how_much_of_the_work_is_attention():
    """Of a L + b L^2 with as much of each at 48 blocks, the exponent there is 1.5."""
    points = [point("full-sequence", n, 1, 1.0, (n - 1) ** 2 + 48 * (n - 1)) for n in (47, 51)]
    assert growth_json(points)["operations_growth_exponent"] == pytest.approx(1.5, abs=0.01)


@pytest.mark.parametrize("way", ["segments", "full-sequence"])
def test_denoising_alone_calls_each_step_as_a_clip_does(way: str):
    models = open_models(get_profile("tiny"), None, torch.device("cpu"))
    opened: list[Variant] = []

    def open_variant(profile: Profile) -> Variant:
        opened.append(eager_variant(models, torch.float32, profile))
        return opened[-1]

    ((one,),) = length_points(models, open_variant, (21,), (way,), Timing(1, 0), denoising_alone=True)
    calls = {name: graph.calls for name, graph in opened[0].graphs.opened().items()}
    steps = clip_calls(length_profile(models.profile, 21, way))["denoise"]
    times = 3  # the cold call, the timed one, the one for memory
    assert Counter({name: count for name, count in calls.items() if name in steps}) == Counter(
        {name: times * count for name, count in steps.items()}
    )
    assert calls.keys() - steps.keys() == {"stage2_time", "stage2_text"}, "no VAE"
    assert one.flops == one.denoise_flops
    assert 0 < one.denoise[0] <= one.samples.warm[0] + 1e-4
