"""Attention and the rotary position embedding that goes before it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention. q [B, heads, Lq, D], k and v [B, heads, Lk, D], mask bool [Lq, Lk] -> [B, heads, Lq, D]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split form. x [B, heads, L, D], cos and sin [L, D/2] fp32 -> [B, heads, L, D].

    Pair i is (x[i], x[i + D/2]); the weights are permuted to this order when they are loaded.
    """
    first, second = x.float().chunk(2, dim=-1)  # [B, heads, L, D] -> 2 x [B, heads, L, D/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
