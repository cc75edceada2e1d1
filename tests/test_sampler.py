"""The sampler: the published schedules, noise per block, Euler on a flow whose answer is known."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from swifti2v.engine.presets import get_profile
from swifti2v.engine.sampler import block_noise, euler_sample, flow_sigmas, shift_sigma, stage_sigmas, unshift_sigma


def test_distilled_four_steps():
    assert flow_sigmas(4, 5.0) == pytest.approx((1.0, 0.9375, 0.833333333, 0.625))


@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (4, 5.0), (7, 3.0), (50, 5.0), (4, 1.0)])
def test_schedule_and_steps_agree_with_diffusers(steps: int, shift: float):
    # diffusers shifts what it is given, and makes another grid when it is given only a count.
    grid = [1 - i / steps for i in range(steps)]
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=grid)
    sigmas = flow_sigmas(steps, shift)
    assert np.allclose(scheduler.sigmas[:-1].numpy(), sigmas, atol=1e-6)
    assert np.allclose(scheduler.timesteps.numpy(), [1000 * sigma for sigma in sigmas], atol=1e-3)
    torch.manual_seed(0)
    start, target = torch.randn(2, 3), torch.randn(2, 3)
    theirs = start
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(theirs * 0.3 - target, timestep, theirs).prev_sample
    ours = euler_sample(lambda x, _: x * 0.3 - target, start, sigmas)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_shift_and_its_inverse():
    for sigma in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert unshift_sigma(shift_sigma(sigma, 5.0), 5.0) == pytest.approx(sigma)


def test_a_schedule_can_start_below_one():
    sigmas = flow_sigmas(4, 5.0, start=0.7)
    assert sigmas[0] == pytest.approx(0.7)
    assert len(sigmas) == 4
    assert all(a > b > 0 for a, b in pairwise(sigmas))


def test_explicit_sigmas_win():
    stage = replace(get_profile("tiny").stage2, sigmas=(0.999, 0.8, 0.6, 0.3))
    assert stage_sigmas(stage) == (0.999, 0.8, 0.6, 0.3), "Wan's own schedule starts below 1"
    assert stage_sigmas(stage, start=0.7) == (0.7, 0.6, 0.3)


def test_euler_is_exact_on_a_straight_flow():
    """With v = noise - x0 constant along the path, any number of steps lands on x0."""
    noise, target = torch.randn(2, 3), torch.randn(2, 3)
    for steps in (1, 4, 9):
        out = euler_sample(lambda x, step: noise - target, noise, flow_sigmas(steps, 5.0))
        assert torch.allclose(out, target, atol=1e-6)


def test_steps_are_reported_in_order():
    seen: list[int] = []
    euler_sample(lambda x, step: x, torch.ones(1), flow_sigmas(5, 3.0), seen.append)
    assert seen == [0, 1, 2, 3, 4]


def test_noise_is_a_function_of_seed_stage_and_block():
    whole = block_noise(7, 2, range(6), (4, 3, 5))
    assert whole.shape == (1, 4, 6, 3, 5)
    assert torch.equal(whole[:, :, 2:5], block_noise(7, 2, (2, 3, 4), (4, 3, 5)))
    assert not torch.equal(whole, block_noise(8, 2, range(6), (4, 3, 5)))
    assert not torch.equal(whole, block_noise(7, 1, range(6), (4, 3, 5)))
    big = block_noise(0, 2, range(8), (16, 32, 32))
    assert abs(big.mean().item()) < 0.02
    assert abs(big.std().item() - 1) < 0.02
    blocks = big[0].transpose(0, 1).flatten(1)  # [C, T, H, W] -> [T, C*H*W]
    correlation = torch.corrcoef(blocks) - torch.eye(8)
    assert correlation.abs().max() < 0.05, "blocks are independent"
