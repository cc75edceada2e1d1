"""The kernels a model is run with: one object instead of switches. Both sets take the same arguments.

EAGER is plain PyTorch, which every exporter can read. `fused` is for a CUDA device with Triton, at inference; `chosen`
has those of them that measuring found to be no slower there, on the calls where they are.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from .dispatch import DTYPES, ChoiceTable, Shape
from .kernel_table import OpTiming, call_text, choose
from .modulation import (
    gated_residual,
    gated_residual_eager,
    modulated_norm,
    modulated_norm_eager,
    residual_norm,
    residual_norm_eager,
)
from .pixels import to_bytes, to_bytes_eager
from .subpixel import upsample_conv, upsample_conv_eager
from .vae_norm import norm_silu_conv, norm_silu_conv_eager
from .window_attention import attend, attend_eager, norm_rope, norm_rope_eager


@dataclass(frozen=True)
class KernelSet:
    """One function for each fused operation; what they take is said where they are defined."""

    norm_rope: Callable[..., Tensor]
    attend: Callable[..., Tensor]
    modulated_norm: Callable[..., Tensor]
    gated_residual: Callable[..., Tensor]
    residual_norm: Callable[..., tuple[Tensor, Tensor]]
    norm_silu_conv: Callable[..., tuple[Tensor, Tensor]]
    upsample_conv: Callable[..., Tensor]
    to_bytes: Callable[..., tuple[Tensor, Tensor]]

    def __deepcopy__(self, memo: dict[int, object]) -> "KernelSet":
        """Itself, as it never changes: ops cannot be copied, and modules that run by them can."""
        return self


EAGER = KernelSet(
    norm_rope_eager,
    attend_eager,
    modulated_norm_eager,
    gated_residual_eager,
    residual_norm_eager,
    norm_silu_conv_eager,
    upsample_conv_eager,
    to_bytes_eager,
)


def attend_by_table(
    table: ChoiceTable,
    gpu: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_k: Tensor | None = None,
    context_v: Tensor | None = None,
) -> Tensor:
    """attend with the backend the table has for this shape on this GPU."""
    return attend(q, k, v, context_k, context_v, table.backend(shape_of(q, k, context_k), gpu))


def shape_of(q: Tensor, k: Tensor, context_k: Tensor | None) -> Shape:
    """What the choice of an attention depends on. q [B, heads, Lq, E], k [B, heads, L, E], context_k alike."""
    batch, heads, queries, dim = q.shape
    context = 0 if context_k is None else context_k.shape[2]
    dtype = next(name for name, dtype in DTYPES.items() if dtype == q.dtype)
    return Shape(batch, heads, queries, k.shape[2], context, dim, dtype)


def fused(table: ChoiceTable, gpu: str) -> KernelSet:
    """The ops, with attention as the table has it for this GPU (its name, as torch.cuda.get_device_name gives it)."""
    return KernelSet(
        norm_rope,
        partial(attend_by_table, table, gpu),
        modulated_norm,
        gated_residual,
        residual_norm,
        norm_silu_conv,
        upsample_conv,
        to_bytes,
    )


def chosen(table: ChoiceTable, gpu: str, timings: Iterable[OpTiming]) -> KernelSet:
    """EAGER with ops fused on the calls where they take no longer, and attention as the table has it for this GPU."""
    timings, every = tuple(timings), fused(table, gpu)
    ops: dict[str, Callable[..., Any]] = {}
    for op in {timing.op for timing in timings if timing.wins}:
        of_op = [timing for timing in timings if timing.op == op]
        wins = frozenset(call for _, call in choose(of_op))
        other = getattr(every, op)
        ops[op] = other if len(wins) == len(of_op) else partial(fused_on, wins, other, getattr(EAGER, op))
    return replace(EAGER, attend=every.attend, **ops)


def fused_on(wins: frozenset[str], other: Callable[..., Any], plain: Callable[..., Any], *arguments: Any) -> Any:
    """The fused form of an op for these calls, as call_text writes them, and the plain one for all else."""
    return (other if call_text(arguments) in wins else plain)(*arguments)
