"""The Triton side of subpixel.py; imported only where a kernel is launched or compiled."""

# Device code is Triton's language, not Python: a branch on a constant is compiled or left out, ranges are its own.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportArgumentType=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, capability, cdiv


@dataclass(frozen=True)
class ConvTile:
    """Cells, output and input channels of one step, warps, pipeline stages."""

    cells: int
    channels_out: int
    channels_in: int
    warps: int
    stages: int


# By architecture, what compiles without spills and within shared memory (test_kernels_offline).
TILES = {
    80: ConvTile(128, 128, 32, 8, 4),
    86: ConvTile(128, 128, 32, 8, 3),
    89: ConvTile(128, 128, 32, 8, 3),
    90: ConvTile(128, 256, 64, 8, 4),
    100: ConvTile(128, 128, 64, 8, 4),
    120: ConvTile(128, 128, 32, 8, 3),
}
WIDE = ConvTile(64, 64, 16, 8, 2)  # in fp32, on any: products without tensor cores, which would round to TF32


@triton.jit
def subpixel_kernel(
    x, weights, bias, out, x_image, x_row, x_column, x_channel, height, width, channels_in, channels_out,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    # The four parities of a tile of cells, and its output channels, run beside each other: they read the same cells.
    tiles = tl.cdiv(channels_out, N)
    program = tl.program_id(0)
    parity = program // tiles % 4
    image = tl.program_id(1).to(tl.int64)
    cell = program // (4 * tiles) * M + tl.arange(0, M)
    channel_out = program % tiles * N + tl.arange(0, N)
    row, column = cell // width, cell % width
    real = cell < height * width
    channel_in = tl.arange(0, K)
    steps = tl.cdiv(channels_in, K)
    x += image * x_image
    weights += parity * 4 * channels_in * channels_out
    acc = tl.zeros([M, N], tl.float32)
    for step in tl.range(0, 4 * steps):
        tap = step // steps  # which of the four pixels
        channel = step % steps * K + channel_in
        source_row = row + parity // 2 - 1 + tap // 2
        source_column = column + parity % 2 - 1 + tap % 2
        inside = real & (source_row >= 0) & (source_row < height) & (source_column >= 0) & (source_column < width)
        where = source_row * x_row + source_column * x_column
        a = tl.load(
            x + where[:, None] + channel[None, :] * x_channel,
            mask=inside[:, None] & (channel < channels_in)[None, :],
            other=0,
        )
        b = tl.load(
            weights + (tap * channels_in + channel)[:, None] * channels_out + channel_out[None, :],
            mask=(channel < channels_in)[:, None] & (channel_out < channels_out)[None, :],
            other=0,
        )
        acc = tl.dot(a, b, acc, input_precision="ieee")
    acc += tl.load(bias + channel_out, mask=channel_out < channels_out, other=0).to(tl.float32)[None, :]
    target = ((image * 2 * height + 2 * row + parity // 2) * 2 * width + 2 * column + parity % 2) * channels_out
    mask = real[:, None] & (channel_out < channels_out)[None, :]
    tl.store(out + target[:, None] + channel_out[None, :], acc.to(out.dtype.element_ty), mask=mask)


def plan_subpixel(x: Tensor, weights: Tensor, bias: Tensor, out: Tensor, tile: ConvTile) -> Launch:
    """x [N, C_in, H, W] of any strides, weights of subpixel_weights, out [N, C_out, 2H, 2W] channels_last."""
    batch, channels_in, height, width = x.shape
    channels_out = bias.shape[0]
    x_image, x_channel, x_row, x_column = x.stride()
    arguments = {
        "x": x, "weights": weights, "bias": bias, "out": out,
        "x_image": x_image, "x_row": x_row, "x_column": x_column, "x_channel": x_channel,
        "height": height, "width": width, "channels_in": channels_in, "channels_out": channels_out,
    }  # fmt: skip
    grid = (cdiv(height * width, tile.cells) * 4 * cdiv(channels_out, tile.channels_out), batch)
    constants = {"M": tile.cells, "N": tile.channels_out, "K": tile.channels_in}
    return Launch(subpixel_kernel, grid, arguments, constants, tile.warps, tile.stages)


def conv_tile(arch: int, dtype: torch.dtype) -> ConvTile:
    """The tile for this compute capability; for an unknown one, that of the nearest below it."""
    if dtype == torch.float32:
        return WIDE
    return TILES[max((known for known in TILES if known <= arch), default=80)]


def subpixel_conv(x: Tensor, weights: Tensor, bias: Tensor, tile: ConvTile | None = None) -> Tensor:
    """Shapes as in subpixel.subpixel_conv."""
    batch, _, height, width = x.shape
    out = torch.empty(
        (batch, bias.shape[0], 2 * height, 2 * width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    plan_subpixel(x, weights, bias, out, tile or conv_tile(capability(x.device), x.dtype)).run()
    return out
