"""A Triton kernel with everything it is launched with: what runs on a GPU is exactly what is compiled offline."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One launch. `arguments` are tensors, tensor descriptors and sizes by name; `constants` are compiled in."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 2
    contract: bool = True  # may a * b + c round once

    def run(self) -> None:
        """Launch on the current stream of the tensors' device, or in the interpreter where that is on."""
        tensor = next(value for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device_of(tensor):  # Triton launches on the current device, whatever the tensors' is
            self.kernel[self.grid](
                **self.arguments,
                **self.constants,
                num_warps=self.warps,
                num_stages=self.stages,
                enable_fp_fusion=self.contract,
            )


def capability(device: torch.device) -> int:
    """Compute capability as one number, 90 for Hopper; 0 for a device that has none."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << (n - 1).bit_length()


def check_rows(**tensors: Tensor | None) -> None:
    """Refuse tensors whose last axis is not contiguous; the kernels read rows."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.stride(-1) != 1:
            raise ValueError(f"{name}: got strides {tensor.stride()}, want 1 in the last axis; make it contiguous")
