"""Which calls a model makes of its kernels, and how long the fused and the eager form of each take on a device."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .dispatch import LIMIT, device_name, elapsed_ms, installed, refusal
from .kernel_set import EAGER, KernelSet
from .kernel_table import OpTiming, call_text
from .subpixel import subpixel_weights

WARMUP = 3
# Arguments that a fused op before this one made, as cuDNN and our kernels leave them: channels last. Only their shapes
# are known from the meta device, where a convolution gives contiguous tensors whatever it is given.
CHAINED = {"norm_silu_conv": (0, 4), "upsample_conv": (0,)}


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an op: tensors of the meta device, which have shape, strides and dtype only, and plain numbers."""

    op: str
    arguments: tuple[Any, ...]

    @property
    def text(self) -> str:
        """The arguments in words."""
        return call_text(self.arguments)

    def inputs(self, device: torch.device, after_fused: bool = False) -> tuple[Any, ...]:
        """The same arguments with normal values, the same ones every time.

        They lie as the op finds them in a model whose ops are all eager; `after_fused`, in one whose ops are all fused.
        """
        generator = torch.Generator(device).manual_seed(0)

        def draw(argument: Any) -> Any:
            if not isinstance(argument, Tensor):
                return argument
            made = torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device=device)
            return made.normal_(generator=generator)

        drawn = tuple(draw(argument) for argument in self.arguments)
        if after_fused:
            chained = CHAINED.get(self.op, ())
            drawn = tuple(channels_last(given) if at in chained else given for at, given in enumerate(drawn))
        if self.op == "upsample_conv":  # one argument is made of another: drawn values would not fit
            x, weight, bias, _ = drawn
            return x, weight, bias, subpixel_weights(weight)
        return drawn


def channels_last(x: Any) -> Any:
    """The same values, of images [N, C, H, W] or videos [B, C, T, H, W], with the channels last in memory."""
    if x is None:  # a first call has no history
        return None
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def recorder(calls: dict[tuple[str, str], Call]) -> KernelSet:
    """The eager kernels, which write every call that is unlike the earlier ones into `calls`, by op and text."""

    def recording(op: str) -> Callable[..., Any]:
        eager = getattr(EAGER, op)

        def run(*arguments: Any) -> Any:
            call = Call(op, arguments)
            calls.setdefault((op, call.text), call)
            return eager(*arguments)

        return run

    return KernelSet(**{field.name: recording(field.name) for field in fields(KernelSet)})


def measure_op(call: Call, kernels: KernelSet, device: torch.device, repeats: int = 20) -> OpTiming:
    """Compare an op of `kernels` with its eager form, then time them in turns. Nothing else should run there."""
    made: list[OpTiming] = []
    refused = refusal(lambda: made.append(_compare(call, kernels, device, repeats)))
    return made[0] if made else OpTiming(call.op, call.text, device_name(device), installed(), refused=refused)


def _compare(call: Call, kernels: KernelSet, device: torch.device, repeats: int) -> OpTiming:
    eager, fused = getattr(EAGER, call.op), getattr(kernels, call.op)
    place = (call.op, call.text, device_name(device), installed())
    error = _distance(_results(fused, call.inputs(device, True)), _results(eager, call.inputs(device)))
    if not error <= LIMIT:
        return OpTiming(*place, error=error, refused=f"relative error {error:.1e}, the limit is {LIMIT:.0e}")
    inputs, others = call.inputs(device), call.inputs(device, True)
    pairs = [
        (elapsed_ms(lambda: eager(*inputs), device), elapsed_ms(lambda: fused(*others), device))
        for _ in range(WARMUP + repeats)
    ]
    one, other = zip(*pairs[WARMUP:], strict=True)
    return OpTiming(*place, one, other, error)


def _results(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The tensors that a call gives."""
    made = function(*arguments)
    return tuple(x for x in (made if isinstance(made, tuple) else (made,)) if isinstance(x, Tensor))


def _distance(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """The largest relative L2 distance of two results."""
    distances = []
    for one, other in zip(got, want, strict=True):
        norm = other.float().norm().clamp_min(torch.finfo(torch.float32).tiny)
        distances.append(float((one.float() - other.float()).norm() / norm))
    return max(distances)
