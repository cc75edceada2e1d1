"""What devices compute in, and how they say that memory ran out."""

import re

import torch


def computes_bf16(device: torch.device) -> bool:
    """Whether bf16 is computed rather than emulated there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def best_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device computes in it, else fp32."""
    return torch.bfloat16 if computes_bf16(device) else torch.float32


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; on a CPU torch says so in a plain RuntimeError."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or re.search(r"(not enough|can't allocate) memory", str(error)) is not None
