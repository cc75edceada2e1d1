"""FP8: the linear layers of a DiT's blocks with weights and inputs in E4M3, all else as it is.

A weight has one scale per output channel, an input one per layer, from calibration.py. Eager computes what the engine
will, and torch.onnx gets QuantizeLinear and DequantizeLinear, which TensorRT makes FP8 kernels of. nvidia-modelopt does
as much, but pins onnx and onnxruntime to versions that are not ours.
"""

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.dit import DiT
from ..engine.errors import SpecError
from .onnx_file import OPSET

SCALES = "scales.json"  # among the artifacts of a step: the scale of every FP8 layer's input
E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # what E4M3 can hold
SMALLEST = 1e-6  # of a peak, so that no scale is zero
# Keys and values of the text are left out: they are computed once a clip, in a graph of their own.
PARTS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")


class Fp8Linear(nn.Module):
    """A linear layer in FP8: products of E4M3 numbers, scaled afterwards. Only for inference."""

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor

    def __init__(self, linear: nn.Linear, input_scale: float) -> None:
        super().__init__()
        weight, dtype = linear.weight.detach().float(), linear.weight.dtype
        scale = (weight.abs().amax(1).clamp(min=SMALLEST) / LARGEST).to(dtype)  # [out]
        self.register_buffer("weight", _to_e4m3(weight / scale.float().unsqueeze(1)))  # [out, in]
        self.register_buffer("weight_scale", scale)
        self.register_buffer("input_scale", torch.tensor(input_scale, dtype=dtype, device=weight.device))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of x."""
        if torch.onnx.is_in_onnx_export():
            return self._symbolic(x)
        narrow = _to_e4m3(x.float() / self.input_scale.float())
        y = F.linear(narrow.to(x.dtype), self.weight.to(x.dtype))  # E4M3 is exact in bf16
        return y * (self.input_scale * self.weight_scale) + self.bias

    def _symbolic(self, x: Tensor) -> Tensor:
        narrow = _node("QuantizeLinear", x, self.input_scale, E4M3)
        wide = _node("DequantizeLinear", narrow, self.input_scale, x.dtype)
        weight = _node("DequantizeLinear", self.weight, self.weight_scale, x.dtype, axis=0)
        return F.linear(wide, weight, self.bias)


def block_linears(dit: DiT) -> dict[str, nn.Linear]:
    """The layers that FP8 is for, by their names in the DiT."""
    names = [f"blocks.{index}.{part}" for index in range(len(dit.blocks)) for part in PARTS]
    return {name: cast(nn.Linear, dit.get_submodule(name)) for name in names}


def narrow_bytes(weight: Tensor) -> int:
    """Bytes of an FP8 layer's weight [out, in] that is of another dtype now, and of the scales that belong to it."""
    return weight.numel() + (weight.shape[0] + 1) * weight.itemsize  # one for each output channel, one for the input


def quantise(dit: DiT, scales: Mapping[str, float]) -> None:
    """Put FP8 layers in the place of the blocks' linear ones, whose weights go: a second copy may not fit into memory.

    `scales` are of the inputs, by layer. SpecError where they are those of another model.
    """
    linears = block_linears(dit)
    if scales.keys() != linears.keys():
        raise SpecError(f"FP8 scales: got {len(scales)}, want one for each of {len(linears)} layers; calibrate again")
    for name, linear in linears.items():
        parent, _, last = name.rpartition(".")
        setattr(dit.get_submodule(parent), last, Fp8Linear(linear, scales[name]))


def input_scales(module: nn.Module) -> dict[str, float]:
    """The scale of every FP8 layer's input, by the layer's name; none where nothing is in FP8."""
    return {name: float(part.input_scale) for name, part in module.named_modules() if isinstance(part, Fp8Linear)}


def _to_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-LARGEST, LARGEST).to(E4M3)


def _node(kind: str, x: Tensor, scale: Tensor, dtype: torch.dtype, **attributes: int) -> Tensor:
    """An ONNX node that gives a tensor of x's shape."""
    if dtype == E4M3:
        attributes["output_dtype"] = 17  # ONNX's number of it
    return torch.onnx.ops.symbolic(kind, (x, scale), {**attributes}, dtype=dtype, shape=x.shape, version=OPSET)
