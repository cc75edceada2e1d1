"""Nearest x2 and the 3x3 convolution after it as four 2x2 convolutions of the small image: 4/9 of the products.

Doubled pixels repeat, so the three taps of a row fall on two pixels of the small image: for even rows the pixel above
(tap 0) and the pixel itself (taps 1 and 2 summed), for odd rows the pixel itself (taps 0 and 1) and the one below
(tap 2); columns likewise. Zeros around the doubled image are zeros around the small one.
Equal up to rounding: the sums of taps are rounded once to the weights' dtype.
"""

# ruff: noqa: ARG001  (an op's fake form takes what the op takes)

import torch
import torch.nn.functional as F
from torch import Tensor

# [parity of the row, pixel of the small image, tap of the 3x3 kernel]
FOLD = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))


def subpixel_weights(weight: Tensor) -> Tensor:
    """Sum the taps, once. weight [C_out, C_in, 3, 3] -> [2, 2, 2, 2, C_in, C_out]: parities, then pixels, row first."""
    fold = torch.tensor(FOLD, dtype=torch.float64, device=weight.device)
    summed = torch.einsum("auy,bvx,oiyx->abuvio", fold, fold, weight.double())
    return summed.to(weight.dtype).contiguous()


def upsample_conv_eager(x: Tensor, weight: Tensor, bias: Tensor | None, folded: Tensor | None = None) -> Tensor:
    """What the four convolutions replace. x [N, C_in, H, W], weight [C_out, C_in, 3, 3] -> [N, C_out, 2H, 2W].

    `folded` is what subpixel_weights makes of the weight, for those who read it.
    """
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def subpixel_conv_eager(x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """Four convolutions and their weaving. x [N, C_in, H, W], weights of subpixel_weights -> [N, C_out, 2H, 2W]."""
    kernels = weights.permute(0, 1, 5, 4, 2, 3)  # [row, column, C_out, C_in, 2, 2]
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1))
    rows = []
    for row in (0, 1):
        views = [padded[:, :, row : row + height + 1, column : column + width + 1] for column in (0, 1)]
        pair = [F.conv2d(view, kernels[row, column], bias) for column, view in enumerate(views)]
        rows.append(torch.stack(pair, dim=-1).flatten(-2))  # 2 x [N, C_out, H, W] -> [N, C_out, H, 2W]
    return torch.stack(rows, dim=3).flatten(2, 3)  # 2 x [N, C_out, H, 2W] -> [N, C_out, 2H, 2W]


@torch.library.custom_op("swifti2v::subpixel_conv", mutates_args=())
def subpixel_conv(x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """subpixel_conv_eager without the weaving: every result is written in its place. Returns channels_last."""
    return subpixel_conv_eager(x, weights, bias).contiguous(memory_format=torch.channels_last)


@subpixel_conv.register_fake
def _(x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    return x.new_empty(batch, bias.shape[0], 2 * height, 2 * width).contiguous(memory_format=torch.channels_last)


@subpixel_conv.register_kernel("cuda")
def _(x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    from . import subpixel_triton

    return subpixel_triton.subpixel_conv(x, weights, bias)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor, folded: Tensor | None = None) -> Tensor:
    """upsample_conv_eager by subpixel_conv; without `folded`, the weights are summed in this call."""
    return subpixel_conv(x, subpixel_weights(weight) if folded is None else folded, bias)
