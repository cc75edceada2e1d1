"""Stage I: the image and the prompt to motion latents, all blocks at once at low resolution."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .calls import Executables, guided_velocity, stream_call, window_feed
from .profile import Profile
from .sampler import euler_sample
from .state import Conditions
from .vae_layers import VaeCache


def expert_of(profile: Profile, sigma: float) -> str:
    """Name of the DiT that works at this sigma; with two experts the high-noise one works from the boundary up."""
    boundary = profile.stage1.boundary
    if boundary is None:
        return "stage1"
    return "stage1_high" if sigma >= boundary else "stage1_low"


def image_condition(graphs: Executables, profile: Profile, image: Tensor) -> Tensor:
    """What Stage I reads of the image [1, 3, 1, h, w].

    For a model with image channels: mask and latents [1, 4+z, F, h', w'] of the clip that is the image and then
    mid-grey. Otherwise the image's latent block alone [1, z, 1, h', w'].
    """
    latents, cache = stream_call(graphs, "image", image, ())
    if not profile.image_channels:
        return latents.float()
    blocks = [latents]
    grey = image.new_zeros(1, 3, profile.block_frames, *image.shape[3:])
    for _ in range(profile.blocks - 1):
        latents, cache = stream_call(graphs, "image", grey, cache)
        blocks.append(latents)
    condition = torch.cat(blocks, dim=2).float()  # F x [1, z, 1, h', w'] -> [1, z, F, h', w']
    mask = condition.new_zeros(1, 4, *condition.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat((mask, condition), dim=1)


def run_stage1(
    graphs: Executables,
    profile: Profile,
    condition: Tensor,
    conditions: Sequence[Conditions],
    noise: Tensor,
    sigmas: Sequence[float],
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Motion latents fp32 [1, z, F, h', w'] from noise of that shape.

    `condition` is image_condition's; `conditions` has one entry per step, since experts differ.
    """
    blocks = range(profile.blocks)
    clean = 0 if profile.image_channels else 1
    experts = [graphs[f"{expert_of(profile, sigma)}_step"] for sigma in sigmas]
    dtype = experts[0].spec.inputs[0].dtype
    feed = window_feed(experts[0], blocks, clean, profile.stage1.dit.head_dim, noise.device)

    def velocity(x: Tensor, step: int) -> Tensor:
        latents = torch.cat((x, condition), dim=1) if profile.image_channels else torch.cat((condition, x), dim=2)
        value, _ = guided_velocity(experts[step], conditions[step], step, {"latents": latents.to(dtype), **feed})
        return value[:, :, clean:]

    x = euler_sample(velocity, noise[:, :, clean:], sigmas, on_step)
    return x if profile.image_channels else torch.cat((condition, x), dim=2)


def decode_motion(graphs: Executables, motion: Tensor, block: int, cache: VaeCache) -> tuple[Tensor, VaeCache]:
    """Low-resolution pixels [1, 3, 1 or 4, h, w] of one motion block; blocks go in order."""
    return stream_call(graphs, "motion", motion[:, :, block : block + 1], cache)
