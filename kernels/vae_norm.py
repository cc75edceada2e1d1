"""The VAE's norm and SiLU, written where the next causal convolution reads.

A causal 3x3x3 convolution reads the present frame and the two before it. Its input is a ring of three frames: each new
frame takes the place of the oldest, and the kernel's time axis is rolled instead of the frames, so that history is
never moved, joined or padded. Axes: B batch, C channels, T frames of this call, H and W rows and columns.
"""

# ruff: noqa: ARG001  (an op's fake form takes what the op takes)

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import channel_norm

FRAMES = 3  # the present and two before it


def norm_silu_into_eager(x: Tensor, gamma: Tensor, ring: Tensor, slot: int) -> None:
    """Write silu(channel_norm(x)) into the ring's frames slot, slot+1, ... modulo its length.

    x [B, C, T, H, W]; gamma [C, 1, 1, 1]; ring [B, C, F, H, W] with T <= F.
    """
    y = F.silu(channel_norm(x, gamma))
    for frame in range(x.shape[2]):
        ring[:, :, (slot + frame) % ring.shape[2]] = y[:, :, frame]


@torch.library.custom_op("swifti2v::norm_silu_into", mutates_args=("ring",))
def norm_silu_into(x: Tensor, gamma: Tensor, ring: Tensor, slot: int) -> None:
    """norm_silu_into_eager in one pass. Fastest where both are channels_last_3d, as the convolution wants them."""
    norm_silu_into_eager(x, gamma, ring, slot)


@norm_silu_into.register_fake
def _(x: Tensor, gamma: Tensor, ring: Tensor, slot: int) -> None:
    return None


@norm_silu_into.register_kernel("cuda")
def _(x: Tensor, gamma: Tensor, ring: Tensor, slot: int) -> None:
    from . import vae_norm_triton

    vae_norm_triton.norm_silu_into(x, gamma, ring, slot)


def new_ring(frame: Tensor) -> Tensor:
    """A ring of zeros, the history of a clip's first frame. frame [B, C, 1, H, W] -> [B, C, 3, H, W]."""
    batch, channels, _, height, width = frame.shape
    shape = (batch, channels, FRAMES, height, width)
    layout = torch.channels_last_3d
    return torch.empty(shape, dtype=frame.dtype, device=frame.device, memory_format=layout).zero_()


def rolled_weights(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One kernel for each slot the newest frame can be in, made once. weight [C_out, C_in, 3, 3, 3] -> 3 like it."""
    # With the newest frame in slot s, slot f holds tap (f - s - 1) modulo 3: the oldest, tap 0, is in slot s + 1.
    first, second, third = (
        weight.roll(slot + 1, dims=2).contiguous(memory_format=torch.channels_last_3d) for slot in range(FRAMES)
    )
    return first, second, third


def ring_conv(ring: Tensor, rolled: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, slot: int) -> Tensor:
    """The causal convolution of the newest frame, in `slot`. ring [B, C_in, 3, H, W] -> [B, C_out, 1, H, W]."""
    return F.conv3d(ring, rolled[slot], bias, padding=(0, 1, 1))


def norm_silu_conv_eager(
    x: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor
) -> tuple[Tensor, Tensor]:
    """What the ring replaces: norm, SiLU, joining with history [B, C, 2, H, W], convolution, copying new history."""
    extended = torch.cat((history, F.silu(channel_norm(x, gamma))), dim=2)  # [B, C, 2+T, H, W]
    return F.conv3d(extended, weight, bias, padding=(0, 1, 1)), extended[:, :, -2:].clone()
