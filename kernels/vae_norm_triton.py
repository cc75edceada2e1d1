"""The Triton side of vae_norm.py; imported only where a kernel is launched or compiled."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, power_of_2

ELEMENTS = 8192  # of one program: 32 a thread


@triton.jit
def norm_silu_kernel(
    x, gamma, out, x_batch, x_channel, x_frame, x_cell, out_batch, out_channel, out_frame, out_cell,
    channels, cells, root, CELLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    batch, frame = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    real = (cell < cells) & (channel < channels)
    source = x + batch * x_batch + frame * x_frame + cell * x_cell + channel * x_channel
    y = tl.load(source, mask=real, other=0).to(tl.float32)  # [CELLS, CHANNELS]
    length = tl.maximum(tl.sqrt(tl.sum(y * y, axis=1)), 1e-12)
    weight = tl.load(gamma + channel, mask=channel < channels, other=0).to(tl.float32)
    y = y * (root / length)[:, None] * weight
    y = y / (1 + tl.exp(-y))
    target = out + batch * out_batch + frame * out_frame + cell * out_cell + channel * out_channel
    tl.store(target, y.to(out.dtype.element_ty), mask=real)


def plan_norm_silu(x: Tensor, gamma: Tensor, out: Tensor) -> Launch:
    """x and out [B, C, T, H, W], their cells (H, W) in one run of equal strides; gamma C values."""
    batch, channels, frames, height, width = x.shape
    arguments = {"x": x, "gamma": gamma, "out": out, "channels": channels, "cells": height * width}
    for name, tensor in (("x", x), ("out", out)):
        strides = tensor.stride()
        if strides[3] != width * strides[4]:
            raise ValueError(f"{name}: got strides {strides}, want rows that follow one another; make it contiguous")
        axes = (f"{name}_batch", f"{name}_channel", f"{name}_frame", f"{name}_cell")
        arguments |= zip(axes, (*strides[:3], strides[4]), strict=True)
    arguments["root"] = channels**0.5
    wide = power_of_2(channels)
    cells = max(1, ELEMENTS // wide)
    grid = (cdiv(height * width, cells), frames, batch)
    return Launch(norm_silu_kernel, grid, arguments, {"CELLS": cells, "CHANNELS": wide}, warps=8)


def norm_silu_into(x: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
    """Shapes as in vae_norm.norm_silu_into. Returns `out`."""
    plan_norm_silu(x, gamma, out).run()
    return out
