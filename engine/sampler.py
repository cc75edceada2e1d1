"""Flow matching: the schedule, the noise and the Euler sampler, as free functions.

x_t = (1 - sigma) x_0 + sigma noise; the model gives v = noise - x_0 and is told the timestep 1000 sigma.
"""

import hashlib
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .profile import StageConfig

TIMESTEPS = 1000.0


def shift_sigma(sigma: float, shift: float) -> float:
    """Move a sigma towards noise: k s / (1 + (k - 1) s)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def unshift_sigma(sigma: float, shift: float) -> float:
    """The inverse of `shift_sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


def flow_sigmas(steps: int, shift: float, start: float = 1.0) -> tuple[float, ...]:
    """`steps` falling sigmas from `start`, evenly spaced before the shift; the final 0 is not among them.

    4 steps at shift 5 give 1, 0.9375, 0.8333, 0.625: the schedule the distilled Wan models are trained on.
    """
    origin = unshift_sigma(start, shift)
    return tuple(shift_sigma(origin * (1 - i / steps), shift) for i in range(steps))


def stage_sigmas(stage: StageConfig, start: float | None = None) -> tuple[float, ...]:
    """The schedule of a stage; explicit sigmas win. With `start` it begins there, without those above."""
    if stage.sigmas is None:
        return flow_sigmas(stage.steps, stage.shift, 1.0 if start is None else start)
    if start is None:
        return stage.sigmas
    return (start, *(sigma for sigma in stage.sigmas if sigma < start))


def block_noise(seed: int, stage: int, blocks: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise fp32 [1, C, len(blocks), H, W]; `shape` is (C, H, W).

    Each block's noise is a function of (seed, stage, block) alone and is drawn on the CPU, so a segment that runs
    again, on any device, starts from the same numbers.
    """
    drawn = []
    for block in blocks:
        digest = hashlib.sha256(f"{seed}/{stage}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        drawn.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(drawn, dim=1).unsqueeze(0)  # len(blocks) x [C, H, W] -> [1, C, len(blocks), H, W]


def euler_sample(
    velocity: Callable[[Tensor, int], Tensor],
    x: Tensor,
    sigmas: Sequence[float],
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Integrate from sigmas[0] to 0. x fp32 of any shape; `velocity(x, step)` has its shape."""
    for step, (sigma, following) in enumerate(pairwise((*sigmas, 0.0))):
        x = x + (following - sigma) * velocity(x, step)
        if on_step is not None:
            on_step(step)
    return x
