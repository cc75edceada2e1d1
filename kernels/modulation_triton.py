"""The Triton side of modulation.py; imported only where a kernel is launched or compiled."""

# Device code is Triton's language, not Python: a branch on a constant is compiled or left out, ranges are its own.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportArgumentType=false

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, check_rows, power_of_2

ROWS = 8  # tokens of one block that share a reading of its scale and shift, which are as large as two tokens each


@triton.jit
def modulation_kernel(
    x, y, gate, scale, shift, out, normed,
    x_batch, x_block, x_token, y_batch, y_block, y_token, gate_batch, gate_block,
    scale_batch, scale_block, shift_batch, shift_block, blocks, tokens, width, eps, offset,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    batch, block = (tl.program_id(1) // blocks).to(tl.int64), (tl.program_id(1) % blocks).to(tl.int64)
    column = tl.arange(0, WIDTH)
    real = column < width
    if GATE:
        gates = tl.load(gate + batch * gate_batch + block * gate_block + column, mask=real, other=0).to(tl.float32)
    if NORM:
        scales = tl.load(scale + batch * scale_batch + block * scale_block + column, mask=real, other=0)
        shifts = tl.load(shift + batch * shift_batch + block * shift_block + column, mask=real, other=0)
        scales, shifts = scales.to(tl.float32) + offset, shifts.to(tl.float32)
    first = tl.program_id(0) * ROWS
    for token in tl.range(first, tl.minimum(first + ROWS, tokens), num_stages=3):  # the next rows load meanwhile
        value = tl.load(x + batch * x_batch + block * x_block + token * x_token + column, mask=real, other=0)
        target = ((batch * blocks + block) * tokens + token) * width + column
        if RESIDUAL:
            added = tl.load(y + batch * y_batch + block * y_block + token * y_token + column, mask=real, other=0)
            if GATE:
                total = value.to(tl.float32) + added.to(tl.float32) * gates
            else:
                total = value.to(tl.float32) + added.to(tl.float32)
            value = total.to(value.dtype)  # the norm sees the sum as it is stored
            tl.store(out + target, value, mask=real)
        if NORM:
            wide = value.to(tl.float32)
            wide = tl.where(real, wide - tl.sum(wide, axis=0) / width, 0)
            spread = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
            tl.store(normed + target, (wide * spread * scales + shifts).to(value.dtype), mask=real)


def plan_modulation(
    x: Tensor,
    residual: tuple[Tensor, Tensor | None, Tensor] | None,
    norm: tuple[Tensor, Tensor, Tensor] | None,
    eps: float = 0.0,
) -> Launch:
    """x [B, T, S, D], last axis of stride 1; residual (y, gate or None, out) and norm (scale, shift, normed).

    y, out and normed have x's shape, out and normed are contiguous; gate is [B, T, D], scale and shift are
    [B, T, D], to be added to one, or a LayerNorm's own weight and bias [D].
    """
    plain = norm is not None and norm[0].ndim == 1
    batch, blocks, tokens, width = x.shape
    y, gate, out = residual or (None, None, None)
    scale, shift, normed = norm or (None, None, None)
    check_rows(x=x, y=y, gate=gate, scale=scale, shift=shift)
    arguments = {"x": x, "y": y, "gate": gate, "scale": scale, "shift": shift, "out": out, "normed": normed}
    for name, tensor in (("x", x), ("y", y)):
        strides = (0, 0, 0) if tensor is None else tensor.stride()[:3]
        arguments |= zip((f"{name}_batch", f"{name}_block", f"{name}_token"), strides, strict=True)
    for name, tensor in (("gate", gate), ("scale", scale), ("shift", shift)):
        strides = (0, 0) if tensor is None or tensor.ndim == 1 else tensor.stride()[:2]
        arguments |= zip((f"{name}_batch", f"{name}_block"), strides, strict=True)
    arguments |= {"blocks": blocks, "tokens": tokens, "width": width, "eps": eps, "offset": float(not plain)}
    constants = {
        "ROWS": ROWS, "WIDTH": power_of_2(width),
        "RESIDUAL": y is not None, "GATE": gate is not None, "NORM": scale is not None,
    }  # fmt: skip
    warps = 4 if width <= 1024 else 8 if width <= 4096 else 16
    return Launch(modulation_kernel, (cdiv(tokens, ROWS), batch * blocks), arguments, constants, warps)


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Shapes as in modulation.modulated_norm."""
    normed = x.new_empty(x.shape)
    plan_modulation(x, None, (scale, shift, normed), eps).run()
    return normed


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Shapes as in modulation.gated_residual."""
    out = x.new_empty(x.shape)
    plan_modulation(x, (y, gate, out), None).run()
    return out


def residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Shapes as in modulation.residual_norm."""
    out, normed = x.new_empty(x.shape), x.new_empty(x.shape)
    plan_modulation(x, (y, gate, out), (scale, shift, normed), eps).run()
    return out, normed
