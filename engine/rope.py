"""Rotary position tables, and the order of the weights that makes the half-split form exact."""

from collections.abc import Sequence

import torch
from torch import Tensor

THETA = 10000.0


def axis_sizes(head_dim: int) -> tuple[int, int, int]:
    """How a head's channels are shared among time, height and width (44, 42, 42 of 128)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope_tables(head_dim: int, positions: Sequence[int], height: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a window of latent blocks.

    `positions` are the blocks' time positions (any integers, gaps allowed); height and width are in tokens.
    Returns two fp32 [T*height*width, head_dim/2], made in fp64; pairs are ordered time, height, width.
    """
    grids = (
        torch.tensor(list(positions), dtype=torch.float64),
        torch.arange(height, dtype=torch.float64),
        torch.arange(width, dtype=torch.float64),
    )
    shape = (len(positions), height, width)
    angles = []
    for axis, (size, grid) in enumerate(zip(axis_sizes(head_dim), grids, strict=True)):
        frequency = THETA ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)  # [size/2]
        angle = torch.outer(grid, frequency)  # [n, size/2]
        view = [1, 1, 1, size // 2]
        view[axis] = shape[axis]
        angles.append(angle.view(view).expand(*shape, size // 2))  # [n, size/2] -> [T, H, W, size/2]
    table = torch.cat(angles, dim=-1).flatten(0, 2)  # [T, H, W, D/2] -> [T*H*W, D/2]
    return table.cos().float(), table.sin().float()


def half_split_order(dim: int, heads: int) -> Tensor:
    """Row order that turns interleaved pairs (2i, 2i+1) into half-split pairs (i, i + D/2) inside every head. [dim]"""
    within = torch.arange(dim // heads)
    order = torch.cat((within[0::2], within[1::2]))  # [D]
    return (torch.arange(heads)[:, None] * (dim // heads) + order).flatten()  # [heads, D] -> [dim]
