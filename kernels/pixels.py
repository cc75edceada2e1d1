"""The decoder's last step: channels back to cells, clipped, as bytes in a video's order."""

import torch
from torch import Tensor


def to_bytes_eager(x: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Pixels in [-1, 1] to bytes, and whether all were finite.

    x [B, 3*p*p, T, H, W], channel order (colour, column, row) -> uint8 [B, T, H*p, W*p, 3], int32 [1]: 0 where every
    value is finite, else 1. Values that are not finite become 0.
    """
    # The extremes are not finite if any value is not, and need no mask of the pixels' size.
    finite = torch.isfinite(torch.stack(torch.aminmax(x))).all()
    numbers = torch.nan_to_num(x, nan=-1, posinf=-1, neginf=-1).float()
    levels = numbers.clamp_(-1, 1).add_(1).mul_(127.5).round_()  # halves to even
    cells = levels.to(torch.uint8).unflatten(1, (3, patch, patch))  # [B, 3, column, row, T, H, W]
    pixels = cells.permute(0, 4, 5, 3, 6, 2, 1).flatten(4, 5).flatten(2, 3)  # [B, T, H, row, W, column, 3] -> frames
    return pixels.contiguous(), (~finite).to(torch.int32).view(1)


@torch.library.custom_op("swifti2v::to_bytes", mutates_args=())
def to_bytes(x: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """to_bytes_eager in one pass."""
    return to_bytes_eager(x, patch)


@to_bytes.register_fake
def _(x: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    batch, _, frames, height, width = x.shape
    shape = (batch, frames, height * patch, width * patch, 3)
    return x.new_empty(shape, dtype=torch.uint8), x.new_empty(1, dtype=torch.int32)


@to_bytes.register_kernel("cuda")
def _(x: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    from . import pixels_triton

    return pixels_triton.to_bytes(x, patch)
