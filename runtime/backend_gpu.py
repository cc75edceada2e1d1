"""What backends that compile for one kind of GPU have in common: its name, and feeds that their code can read."""

import torch
from torch import Tensor

from ..engine.errors import EnvironmentMismatch, SpecError
from ..engine.manifest import Precision
from ..engine.spec import Feed, GraphSpec

ALIGNED = 256  # bytes that tensors must begin at a multiple of


def gpu_precisions(device: torch.device) -> tuple[Precision, ...]:
    """The best first; none without a GPU. GPUs before Ampere have no bf16."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ()
    return ("bf16", "fp16", "fp32") if torch.cuda.get_device_capability(device)[0] >= 8 else ("fp16", "fp32")


def gpu_arch(backend: str, device: torch.device) -> str:
    """The compute capability, such as sm89. EnvironmentMismatch where there is no GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        seen = "a PyTorch without CUDA" if torch.version.cuda is None else "no GPU that PyTorch sees"
        raise EnvironmentMismatch(
            f"{backend} on {device.type}: got {seen}, want an NVIDIA GPU to run it on; use another backend here"
        )
    return f"sm{''.join(map(str, torch.cuda.get_device_capability(device)))}"


def arch_device(arch: str) -> torch.device:
    """The kind of device that an architecture is of."""
    return torch.device("cpu" if arch.startswith("cpu") else "cuda")


def gpu_index(device: torch.device) -> torch.device:
    """The device by its number: the current one where none is said."""
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


def check_device(spec: GraphSpec, feed: Feed, device: torch.device) -> None:
    """Refuse tensors that lie elsewhere."""
    for name, tensor in feed.items():
        if tensor.device != device:
            raise SpecError(f"{spec.name}.{name}: got a tensor on {tensor.device}, want {device}; move it there")


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy in the same layout where compiled code could not read it as it lies."""
    return tensor if tensor.data_ptr() % ALIGNED == 0 else tensor.clone()
