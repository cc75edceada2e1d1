"""The Triton side of pixels.py; imported only where a kernel is launched or compiled."""

# Device code is Triton's language, not Python: a branch on a constant is compiled or left out, ranges are its own.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv

BYTES = 1024  # of one program


@triton.jit
def bytes_kernel(
    x, out, broken, x_batch, x_channel, x_frame, x_row, x_column, frames, width,
    PATCH: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    batch, frame = (tl.program_id(2) // frames).to(tl.int64), (tl.program_id(2) % frames).to(tl.int64)
    row = tl.program_id(1)  # of the result
    index = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    real = index < width * PATCH * 3
    colour, column = index % 3, index // 3
    channel = (colour * PATCH + column % PATCH) * PATCH + row % PATCH
    source = x + batch * x_batch + frame * x_frame + row // PATCH * x_row + column // PATCH * x_column
    value = tl.load(source + channel * x_channel, mask=real, other=0).to(tl.float32)
    finite = tl.abs(value) < float("inf")  # false for nan too
    value = tl.minimum(tl.maximum(tl.where(finite, value, -1.0), -1.0), 1.0)
    # Adding 1.5 * 2**23 leaves no bits for a fraction: it rounds halves to even, as torch.round does.
    level = ((value + 1) * 127.5 + 12582912.0) - 12582912.0
    # Launched in order: batch, frame, row.
    target = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + row) * width * PATCH * 3 + index
    tl.store(out + target, level.to(tl.int32).to(tl.uint8), mask=real)
    missed = tl.sum((real & (finite == 0)).to(tl.int32), axis=0)
    tl.store(broken, 1, mask=missed > 0)


def plan_bytes(x: Tensor, patch: int, out: Tensor, broken: Tensor) -> Launch:
    """x [B, 3*p*p, T, H, W] of any strides, out uint8 [B, T, H*p, W*p, 3] contiguous, broken int32 [1] zero."""
    batch, _, frames, height, width = x.shape
    axes = ("x_batch", "x_channel", "x_frame", "x_row", "x_column")
    arguments = {"x": x, "out": out, "broken": broken, "frames": frames, "width": width}
    arguments |= zip(axes, x.stride(), strict=True)
    grid = (cdiv(width * patch * 3, BYTES), height * patch, batch * frames)
    # Without fused multiply-adds, so that the product rounds as the eager form's does and no level differs.
    return Launch(bytes_kernel, grid, arguments, {"PATCH": patch, "BYTES": BYTES}, contract=False)


def to_bytes(x: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Shapes as in pixels.to_bytes."""
    batch, _, frames, height, width = x.shape
    out = torch.empty((batch, frames, height * patch, width * patch, 3), dtype=torch.uint8, device=x.device)
    broken = torch.zeros(1, dtype=torch.int32, device=x.device)
    plan_bytes(x, patch, out, broken).run()
    return out, broken
