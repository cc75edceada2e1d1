"""The kernels a model is run with: one object instead of switches. Both sets take the same arguments.

EAGER is plain PyTorch, which every exporter can read. `fused` is for a CUDA device with Triton, at inference; `chosen`
has those of them that measuring found to be no slower there.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from .dispatch import DTYPES, ChoiceTable, Shape
from .modulation import (
    gated_residual,
    gated_residual_eager,
    modulated_norm,
    modulated_norm_eager,
    residual_norm,
    residual_norm_eager,
)
from .pixels import to_bytes, to_bytes_eager
from .subpixel import subpixel_conv, subpixel_conv_eager
from .vae_norm import norm_silu_into, norm_silu_into_eager
from .window_attention import attend, attend_eager, norm_rope, norm_rope_eager


@dataclass(frozen=True)
class KernelSet:
    """One function for each fused operation; what they take is said where they are defined."""

    norm_rope: Callable[..., Tensor]
    attend: Callable[..., Tensor]
    modulated_norm: Callable[..., Tensor]
    gated_residual: Callable[..., Tensor]
    residual_norm: Callable[..., tuple[Tensor, Tensor]]
    norm_silu_into: Callable[..., None]
    subpixel_conv: Callable[..., Tensor]
    to_bytes: Callable[..., tuple[Tensor, Tensor]]


EAGER = KernelSet(
    norm_rope_eager,
    attend_eager,
    modulated_norm_eager,
    gated_residual_eager,
    residual_norm_eager,
    norm_silu_into_eager,
    subpixel_conv_eager,
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
        norm_silu_into,
        subpixel_conv,
        to_bytes,
    )


def chosen(table: ChoiceTable, gpu: str, names: Iterable[str]) -> KernelSet:
    """EAGER with the ops of these names fused, and attention as the table has it for this GPU."""
    every = fused(table, gpu)
    return replace(EAGER, attend=every.attend, **{name: getattr(every, name) for name in names})
