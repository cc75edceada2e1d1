"""LayerNorm with a scale and shift per latent block, and the gated residual before it, as ops of one pass each.

Axes: B batch, T latent blocks, S tokens of a block, D width. The ops are for inference: they have no gradient.
The eager form of each is what the op computes off a GPU, and what a graph for a compiler holds.
"""

# ruff: noqa: ARG001  (an op's fake form takes what the op takes)

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import gated_residual as gated_residual_eager
from .norm import modulated_layer_norm


def modulated_norm_eager(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift with rows [B, T, D]; or * scale + shift with a LayerNorm's own [D].

    x [B, T, S, D] -> [B, T, S, D].
    """
    if scale.ndim == 1:
        return F.layer_norm(x.float(), scale.shape, scale.float(), shift.float(), eps).to(x.dtype)
    return modulated_layer_norm(x, scale, shift, eps)


def residual_norm_eager(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + gate * y (x + y without a gate), and its modulated norm.

    x, y [B, T, S, D], gate [B, T, D], scale and shift as in modulated_norm_eager -> 2 x [B, T, S, D].
    """
    total = x + y if gate is None else gated_residual_eager(x, y, gate)
    return total, modulated_norm_eager(total, scale, shift, eps)


@torch.library.custom_op("swifti2v::modulated_norm", mutates_args=())
def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """modulated_norm_eager in one pass. The last axes have stride 1; scale and shift may be views of a table."""
    return modulated_norm_eager(x, scale, shift, eps).contiguous()


@torch.library.custom_op("swifti2v::gated_residual", mutates_args=())
def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y in one pass. x, y [B, T, S, D], gate [B, T, D] fp32 -> [B, T, S, D]."""
    return gated_residual_eager(x, y, gate).contiguous()


@torch.library.custom_op("swifti2v::residual_norm", mutates_args=())
def residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """residual_norm_eager in one pass: the sum is written once and normed before it leaves the registers."""
    total, normed = residual_norm_eager(x, y, gate, scale, shift, eps)
    return total.contiguous(), normed.contiguous()


@modulated_norm.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@gated_residual.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@residual_norm.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@modulated_norm.register_kernel("cuda")
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    from . import modulation_triton

    return modulation_triton.modulated_norm(x, scale, shift, eps)


@gated_residual.register_kernel("cuda")
def _(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    from . import modulation_triton

    return modulation_triton.gated_residual(x, y, gate)


@residual_norm.register_kernel("cuda")
def _(x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from . import modulation_triton

    return modulation_triton.residual_norm(x, y, gate, scale, shift, eps)
