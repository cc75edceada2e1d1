"""The VAE's norm and SiLU, written where the causal convolution after them reads.

A causal 3x3x3 convolution reads the frames of this call and the two before them. Plain PyTorch makes the normed frames
in seven passes and joins them to history in one more; here they are written behind it at once.
Axes: B batch, C channels, T frames of this call, H and W rows and columns.
"""

# ruff: noqa: ARG001  (an op's fake form takes what the op takes)

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import channel_norm

HISTORY = 2  # frames before the present that a convolution sees


def norm_silu_into_eager(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    """Write silu(channel_norm(x)) to `out`. x and out [B, C, T, H, W]; gamma [C, 1, 1, 1]."""
    out.copy_(F.silu(channel_norm(x, gamma)))


@torch.library.custom_op("swifti2v::norm_silu_into", mutates_args=("out",))
def norm_silu_into(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    """norm_silu_into_eager in one pass. Fastest where both are channels_last_3d, as the convolution wants them."""
    norm_silu_into_eager(x, gamma, out)


@norm_silu_into.register_fake
def _(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    return None


@norm_silu_into.register_kernel("cuda")
def _(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    from . import vae_norm_triton

    vae_norm_triton.norm_silu_into(x, gamma, out)


def with_history(x: Tensor, history: Tensor | None, frames: int) -> Tensor:
    """x [B, C, T, H, W] after its `frames` frames of history, zeros where there is none -> [B, C, frames+T, H, W]."""
    return F.pad(x, (0, 0, 0, 0, frames, 0)) if history is None else torch.cat((history, x), dim=2)


def norm_silu_conv_eager(
    x: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Norm, SiLU and a causal convolution: its result, and the history of the next call, a view of something larger.

    x [B, C, T, H, W], weight [C_out, C, 3, 3, 3], history [B, C, 2, H, W], or None for zeros
    -> [B, C_out, T, H, W], [B, C, 2, H, W].
    """
    extended = with_history(F.silu(channel_norm(x, gamma)), history, HISTORY)
    return F.conv3d(extended, weight, bias, padding=(0, 1, 1)), extended[:, :, -HISTORY:]


def norm_silu_conv(
    x: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None
) -> tuple[Tensor, Tensor]:
    """norm_silu_conv_eager with the normed frames written in place; what it gives is channels_last_3d."""
    batch, channels, frames, height, width = x.shape
    shape, layout = (batch, channels, HISTORY + frames, height, width), torch.channels_last_3d
    extended = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    before, present = extended.split((HISTORY, frames), dim=2)
    if history is None:
        before.zero_()
    else:
        before.copy_(history)
    norm_silu_into(x, gamma, present)
    return F.conv3d(extended, weight, bias, padding=(0, 1, 1)), extended[:, :, -HISTORY:]
