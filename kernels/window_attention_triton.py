"""The Triton side of window_attention.py; imported only where a kernel is launched or compiled."""

# Device code is Triton's language, not Python: a branch on a constant is compiled or left out, ranges are its own.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportArgumentType=false

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Launch, capability, cdiv, check_rows, power_of_2

ROWS = 8  # tokens that share a reading of the norm's weight, which is as large as one of them


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one step, warps, pipeline stages; `tma` loads keys and values by tensor descriptor."""

    queries: int
    keys: int
    warps: int
    stages: int
    tma: bool = False

    @property
    def name(self) -> str:
        return f"triton-{self.queries}x{self.keys}" + ("-tma" if self.tma else "")


# By architecture, what compiles without spills and within shared memory at head_dim 64 and 128 (test_kernels_offline).
TILES = {
    80: (Tile(128, 32, 8, 3),),
    86: (Tile(128, 32, 8, 3),),
    89: (Tile(128, 32, 8, 3),),
    90: (Tile(128, 128, 8, 2, tma=True), Tile(128, 64, 8, 3, tma=True), Tile(128, 64, 8, 3)),
    100: (Tile(128, 128, 8, 2),),
    120: (Tile(128, 32, 8, 3),),
}


def tiles(arch: int) -> tuple[Tile, ...]:
    """The tiles to choose from on this compute capability; of an unknown one, those of the nearest below it."""
    return TILES[max((known for known in TILES if known <= arch), default=80)]


@triton.jit
def norm_rope_kernel(
    x, weight, cos, sin, out, x_batch, x_token, out_batch, out_head, out_token, tokens, heads, eps,
    ROWS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, PAIRS)[None, :]
    real = (head < heads) & (pair < HALF)
    column = head * (2 * HALF) + pair  # of a pair's first half
    weight1 = tl.load(weight + column, mask=real, other=0).to(tl.float32)  # [HEADS, PAIRS], read once for all rows
    weight2 = tl.load(weight + column + HALF, mask=real, other=0).to(tl.float32)
    first = tl.program_id(0) * ROWS
    for token in tl.range(first, tl.minimum(first + ROWS, tokens), num_stages=3):  # the next rows load meanwhile
        source = x + batch * x_batch + token * x_token + column
        a = tl.load(source, mask=real, other=0).to(tl.float32)
        b = tl.load(source + HALF, mask=real, other=0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(tl.sum(a * a + b * b, axis=1), axis=0) / (heads * 2 * HALF) + eps)
        a, b = a * scale * weight1, b * scale * weight2
        if ROPE:
            c = tl.load(cos + token * HALF + pair, mask=pair < HALF, other=0)  # [1, PAIRS]
            s = tl.load(sin + token * HALF + pair, mask=pair < HALF, other=0)
            a, b = a * c - b * s, b * c + a * s
        target = out + batch * out_batch + head * out_head + token * out_token + pair
        tl.store(target, a.to(out.dtype.element_ty), mask=real)
        tl.store(target + HALF, b.to(out.dtype.element_ty), mask=real)


def plan_norm_rope(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, out: Tensor, heads: int, eps: float
) -> Launch:
    """x [B, L, D], cos and sin [L, D/heads/2] contiguous fp32, out [B, heads, L, D/heads] with any strides."""
    half = x.shape[2] // heads // 2
    check_rows(x=x, cos=cos, sin=sin, out=out)
    arguments = {
        "x": x, "weight": weight, "cos": cos, "sin": sin, "out": out,
        "x_batch": x.stride(0), "x_token": x.stride(1),
        "out_batch": out.stride(0), "out_head": out.stride(1), "out_token": out.stride(2),
        "tokens": x.shape[1], "heads": heads, "eps": eps,
    }  # fmt: skip
    wide, pairs = power_of_2(heads), power_of_2(half)
    constants = {"ROWS": ROWS, "HEADS": wide, "PAIRS": pairs, "HALF": half, "ROPE": cos is not None}
    warps = 8 if wide * pairs <= 2048 else 16
    return Launch(norm_rope_kernel, (cdiv(x.shape[1], ROWS), x.shape[0]), arguments, constants, warps)


@triton.jit
def load_tile(
    source, base, start, limit, batch, head, stride,
    BLOCK: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    if TMA:  # `source` is a descriptor, which gives zeros beyond the end
        tile = source.load([batch, head, start, 0]).reshape(BLOCK, D)
    else:
        row = start + tl.arange(0, BLOCK)[:, None]
        where = source + base + row * stride + tl.arange(0, D)[None, :]
        if MASK:  # noqa: SIM108  (Triton compiles one branch only)
            tile = tl.load(where, mask=row < limit, other=0)
        else:
            tile = tl.load(where)
    return tile


@triton.jit
def attend_step(
    acc, top, total, q, k, v, start, k_base, v_base, k_token, v_token, limit, batch, head, scale,
    BLOCK: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    keys = load_tile(k, k_base, start, limit, batch, head, k_token, BLOCK, D, TMA, MASK)
    scores = tl.dot(q, tl.trans(keys))  # [queries, BLOCK]
    if MASK:
        scores = tl.where(start + tl.arange(0, BLOCK)[None, :] < limit, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
    share = tl.exp2(scores * scale - new_top[:, None])
    fade = tl.exp2(top - new_top)
    values = load_tile(v, v_base, start, limit, batch, head, v_token, BLOCK, D, TMA, MASK)
    acc = tl.dot(share.to(values.dtype), values, acc * fade[:, None])
    return acc, new_top, total * fade + tl.sum(share, axis=1)


@triton.jit
def attend_segment(
    acc, top, total, q, k, v, k_base, v_base, k_token, v_token, limit, batch, head, scale,
    BLOCK: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    whole = limit // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK):
        acc, top, total = attend_step(
            acc, top, total, q, k, v, start, k_base, v_base, k_token, v_token, limit, batch, head, scale,
            BLOCK, D, TMA, False,
        )  # fmt: skip
    if TAIL:  # what is left is apart, so that whole tiles need no mask; a loop, so that it is loaded as they are
        for start in tl.range(whole, limit, BLOCK):
            acc, top, total = attend_step(
                acc, top, total, q, k, v, start, k_base, v_base, k_token, v_token, limit, batch, head, scale,
                BLOCK, D, TMA, True,
            )  # fmt: skip
    return acc, top, total


@triton.jit
def attention_kernel(
    q, k, v, context_k, context_v, out,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    context_k_batch, context_k_head, context_k_token, context_v_batch, context_v_head, context_v_token,
    heads, queries, tokens, context, scale,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, TAIL: tl.constexpr,
    CONTEXT: tl.constexpr, CONTEXT_TAIL: tl.constexpr,
):  # fmt: skip
    # Tiles of one head run beside each other: its keys and values, 9 MB at 2K, stay in the L2 cache.
    head = tl.program_id(1) % heads
    batch = tl.program_id(1) // heads
    wide_batch, wide_head = batch.to(tl.int64), head.to(tl.int64)
    row = tl.program_id(0) * M + tl.arange(0, M)[:, None]
    column = tl.arange(0, D)[None, :]
    q = tl.load(q + wide_batch * q_batch + wide_head * q_head + row * q_token + column, mask=row < queries, other=0)
    acc = tl.zeros([M, D], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    if CONTEXT:
        k_base = wide_batch * context_k_batch + wide_head * context_k_head
        v_base = wide_batch * context_v_batch + wide_head * context_v_head
        acc, top, total = attend_segment(
            acc, top, total, q, context_k, context_v, k_base, v_base, context_k_token, context_v_token, context,
            batch, head, scale, N, D, TMA, CONTEXT_TAIL,
        )  # fmt: skip
    k_base, v_base = wide_batch * k_batch + wide_head * k_head, wide_batch * v_batch + wide_head * v_head
    acc, top, total = attend_segment(
        acc, top, total, q, k, v, k_base, v_base, k_token, v_token, tokens, batch, head, scale, N, D, TMA, TAIL
    )
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    target = out + ((wide_batch * queries + row) * heads + head) * D + column  # [B, queries, heads, D]
    tl.store(target, result, mask=row < queries)


def plan_attention(
    q: Tensor, k: Tensor, v: Tensor, context_k: Tensor | None, context_v: Tensor | None, out: Tensor, tile: Tile
) -> Launch:
    """Shapes as in window_attention.attend; out [B, queries, heads, D] contiguous; the last axis has stride 1."""
    batch, heads, queries, dim = q.shape
    check_rows(q=q, k=k, v=v, context_k=context_k, context_v=context_v)
    keys = {"k": k, "v": v, "context_k": context_k, "context_v": context_v}
    arguments: dict[str, Any] = {"q": q, "out": out, "heads": heads, "queries": queries, "tokens": k.shape[2]}
    arguments["context"] = 0 if context_k is None else context_k.shape[2]
    arguments["scale"] = dim**-0.5 * 1.4426950408889634  # exp(x) is 2 ** (x * log2(e))
    for name, tensor in {"q": q, **keys}.items():
        strides = (0, 0, 0) if tensor is None else tensor.stride()[:3]
        arguments |= zip((f"{name}_batch", f"{name}_head", f"{name}_token"), strides, strict=True)
    block = [1, 1, tile.keys, dim]
    for name, tensor in keys.items():
        described = tile.tma and tensor is not None
        arguments[name] = TensorDescriptor.from_tensor(tensor, block) if described else tensor
    constants = {
        "M": tile.queries, "N": tile.keys, "D": dim, "TMA": tile.tma, "TAIL": k.shape[2] % tile.keys > 0,
        "CONTEXT": context_k is not None, "CONTEXT_TAIL": arguments["context"] % tile.keys > 0,
    }  # fmt: skip
    grid = (cdiv(queries, tile.queries), batch * heads)
    return Launch(attention_kernel, grid, arguments, constants, tile.warps, tile.stages)


def attend(
    q: Tensor, k: Tensor, v: Tensor, context_k: Tensor | None, context_v: Tensor | None, tile: Tile | None = None
) -> Tensor:
    """Attention over context and own keys; shapes as in window_attention.attend. Returns [B, queries, heads, D]."""
    batch, heads, queries, dim = q.shape
    out = q.new_empty(batch, queries, heads, dim)
    plan_attention(q, k, v, context_k, context_v, out, tile or tiles(capability(q.device))[0]).run()
    return out


def norm_rope(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, out: Tensor, heads: int, eps: float
) -> Tensor:
    """RMSNorm over the width and rotation, written to `out`; shapes as in plan_norm_rope. Returns `out`."""
    plan_norm_rope(x, weight, cos, sin, out, heads, eps).run()
    return out
