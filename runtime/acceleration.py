"""What a run uses of a GPU beyond plain PyTorch, and what is refused elsewhere."""

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from ..engine.errors import EnvironmentMismatch
from ..kernels.dispatch import Shape
from ..kernels.kernel_set import EAGER, KernelSet

# auto: on a GPU with Triton every fused kernel that is no slower, elsewhere eager. fused: the same, refused elsewhere.
KernelChoice = Literal["auto", "eager", "fused"]
KERNEL_CHOICES: tuple[KernelChoice, ...] = ("auto", "eager", "fused")


@dataclass(frozen=True)
class Acceleration:
    """How modules are run. The default is plain PyTorch, on any device."""

    kernels: KernelSet = EAGER
    fused: tuple[tuple[str, str], ...] = ()  # op and arguments of the calls that run fused
    attention: tuple[tuple[Shape, str], ...] = ()  # the backend of every shape
    cuda_graphs: bool = False  # denoising steps are captured and replayed

    @property
    def words(self) -> str:
        """What differs from plain PyTorch, empty if nothing does. A digest stands for kernels, as they decide bits."""
        said = []
        if self.fused or self.attention:
            choice = repr((self.fused, self.attention)).encode()
            said.append(f"measured kernels {hashlib.sha256(choice).hexdigest()[:8]}")
        return ", ".join([*said, *(["CUDA graphs"] if self.cuda_graphs else [])])


def can_fuse(device: torch.device) -> bool:
    """Whether fused kernels can run there."""
    return device.type == "cuda" and find_spec("triton") is not None


def check_acceleration(kernels: KernelChoice, cuda_graphs: bool, device: torch.device) -> None:
    """EnvironmentMismatch for what was asked for by name and cannot be had on this device."""
    if kernels == "fused" and device.type != "cuda":
        raise EnvironmentMismatch(f"fused kernels: got device {device}, want cuda; run with kernels auto or eager")
    if kernels == "fused" and not can_fuse(device):
        raise EnvironmentMismatch("fused kernels: got no triton, want it; pip install 'swifti2v[triton]'")
    if cuda_graphs and device.type != "cuda":
        raise EnvironmentMismatch(f"CUDA graphs: got device {device}, want cuda; run without them")
