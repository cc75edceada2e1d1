"""Attention over a window whose clean context and noisy tokens lie in separate buffers.

Three ops. The norm before attention goes over the whole width, all heads together, while attention works on one head:
fused into it, every tile would need the other heads of its rows. So norm and rotation are one pass before it, which
reads a projection as it lies, [B, L, D], and writes what the attention reads, [B, heads, L, D/heads]. That pass can
write into a place of a larger buffer. Attention then takes keys and values as two segments, context and own; with the
context normed, rotated and kept, a step touches its own tokens only. Its result is token-major, ready for the output
projection. The ops are for inference: they have no gradient.

Axes: B batch, L tokens, D width, E = D/heads.
"""

# ruff: noqa: ARG001  (an op's fake form takes what the op takes)

import torch
from torch import Tensor

from .attention import attention, rotate_half
from .dispatch import run_backend
from .norm import rms_norm


def norm_rope_eager(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, eps: float
) -> Tensor:
    """RMSNorm over the width, split into heads, rotation. x [B, L, D], cos and sin fp32 [L, E/2] -> [B, heads, L, E].

    Without tables nothing is rotated.
    """
    normed = rms_norm(x, weight, eps).unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, L, D] -> [B, heads, L, E]
    return normed if cos is None or sin is None else rotate_half(normed, cos, sin)


def attend_eager(
    q: Tensor, k: Tensor, v: Tensor, context_k: Tensor | None = None, context_v: Tensor | None = None
) -> Tensor:
    """Softmax attention over the context and the tokens themselves, joined. q [B, heads, Lq, E], k and v
    [B, heads, L, E], context_k and context_v [B, heads, C, E] -> [B, Lq, heads, E].
    """
    if context_k is not None and context_v is not None:
        k, v = torch.cat((context_k, k), dim=2), torch.cat((context_v, v), dim=2)  # [B, heads, C+L, E]
    return attention(q, k, v).transpose(1, 2)


@torch.library.custom_op("swifti2v::norm_rope", mutates_args=())
def norm_rope(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, eps: float) -> Tensor:
    """norm_rope_eager in one pass; the result is contiguous."""
    return norm_rope_eager(x, weight, cos, sin, heads, eps).contiguous()


@torch.library.custom_op("swifti2v::norm_rope_into", mutates_args=("out",))
def norm_rope_into(
    out: Tensor, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, eps: float
) -> None:
    """norm_rope into `out` [B, heads, L, E], which may be a slice of a longer buffer: no joining afterwards."""
    out.copy_(norm_rope_eager(x, weight, cos, sin, heads, eps))


@torch.library.custom_op("swifti2v::attend", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, context_k: Tensor | None, context_v: Tensor | None, backend: str = "sdpa"
) -> Tensor:
    """attend_eager by a backend of dispatch.candidates, on a GPU; a CPU has the eager form only."""
    return attend_eager(q, k, v, context_k, context_v).contiguous()


@norm_rope.register_fake
def _(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, eps: float) -> Tensor:
    batch, tokens, width = x.shape
    return x.new_empty(batch, heads, tokens, width // heads)


@norm_rope_into.register_fake
def _(out: Tensor, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, eps: float) -> None:
    return None


@attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, context_k: Tensor | None, context_v: Tensor | None, backend: str = "sdpa"
) -> Tensor:
    batch, heads, queries, dim = q.shape
    return q.new_empty(batch, queries, heads, dim)


@norm_rope.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, eps: float) -> Tensor:
    from . import window_attention_triton

    batch, tokens, width = x.shape
    out = x.new_empty(batch, heads, tokens, width // heads)
    return window_attention_triton.norm_rope(x, weight, cos, sin, out, heads, eps)


@norm_rope_into.register_kernel("cuda")
def _(out: Tensor, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, eps: float) -> None:
    from . import window_attention_triton

    window_attention_triton.norm_rope(x, weight, cos, sin, out, heads, eps)


@attend.register_kernel("cuda")
def _(
    q: Tensor, k: Tensor, v: Tensor, context_k: Tensor | None, context_v: Tensor | None, backend: str = "sdpa"
) -> Tensor:
    return run_backend(backend, q, k, v, context_k, context_v)
