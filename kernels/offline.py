"""Compile a launch for any NVIDIA architecture, with no GPU and no driver."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .launch import Launch

# Shared memory one block may use, bytes, by compute capability.
SHARED_LIMIT = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int32: "i32",
}
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Compiled:
    """Machine code for one architecture, and the shared memory a block of it takes, bytes."""

    capability: int
    shared: int
    cubin: bytes
    ptx: str


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile as the launch itself would on a GPU of this capability; tensors may be on the meta device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, dict(launch.constants), {}
    for index, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        kind, aligned = describe(launch.arguments[name])
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = launch.arguments[name]
        if aligned:
            attributes[(index,)] = ALIGNED
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": launch.contract}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return Compiled(capability, made.metadata.shared, made.asm["cubin"], made.asm["ptx"])


def describe(value: Any) -> tuple[str, bool]:
    """Triton's type of an argument, and whether it is known to be a multiple of 16, as Triton specialises on launch."""
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype], value.storage_offset() * value.itemsize % 16 == 0
    if isinstance(value, int):
        if value == 1:
            return "constexpr", False
        return ("i32" if abs(value) < 2**31 else "i64"), value % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    if value is None:
        return "constexpr", False
    return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>", False  # a host-made TMA descriptor
