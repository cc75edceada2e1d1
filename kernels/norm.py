"""Normalisations and the modulation around them: fp32 inside, the input's dtype outside."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis. x [..., D], weight [D] -> [..., D]."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


def modulated_layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm without weights, then one scale and shift per latent block.

    x [B, T, S, D] (T blocks of S tokens), scale and shift [B, T, D] fp32 -> [B, T, S, D].
    """
    normed = F.layer_norm(x.float(), (x.shape[-1],), eps=eps)
    return (normed * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y with one gate per latent block. x, y [B, T, S, D], gate [B, T, D] fp32 -> [B, T, S, D]."""
    return torch.addcmul(x.float(), y.float(), gate.unsqueeze(2)).to(x.dtype)


def channel_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """The Wan VAE's norm over channels: unit length, times sqrt(C) and gamma. x [B, C, ...], gamma [C, 1, ...]."""
    y = x.float()
    # F.normalize gives the same numbers; its norm over a strided axis takes five times as long on a CPU.
    length = y.square().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
    return (y * (x.shape[1] ** 0.5 / length) * gamma.float()).to(x.dtype)
