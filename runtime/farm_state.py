"""What a killed shot goes on from: motion latents and SegmentState in one safetensors file, with a checksum inside."""

import contextlib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..engine.state import SegmentState
from .farm_errors import FarmError
from .image import part_of

FORMAT = "1"
PLAIN = ("anchor", "latents", "reference")
LAST = torch.channels_last_3d
CACHES = ("motion_cache", "reference_cache", "decoder_cache")


@dataclass(frozen=True)
class Saved:
    """What Stage I made for the whole clip, and the state that the next segment takes."""

    motion: Tensor
    state: SegmentState


def save_state(path: Path, saved: Saved) -> None:
    """Write the file so that it appears whole or not at all. OSError or FarmError where it cannot."""
    named = _named(saved)
    last = [name for name, tensor in named.items() if tensor.is_contiguous(memory_format=LAST)]
    tensors = {name: tensor.cpu().contiguous() for name, tensor in named.items()}
    metadata = {"format": FORMAT, "segment": str(saved.state.segment), "sha256": _digest(tensors)}
    metadata["channels_last"] = " ".join(last)  # a convolution of another layout gives other bits
    part = part_of(path)
    try:
        save_file(tensors, part, metadata)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except SafetensorError as error:
        raise FarmError(f"{path}: got '{error}', want a finished file; check {path.parent} for free space") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def load_state(path: Path, device: torch.device, dtype: torch.dtype) -> Saved:
    """Read it back, caches in the dtype of the graphs. FarmError for a file that is damaged or of another format."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except SafetensorError as error:
        raise FarmError(f"{path}: got '{error}', want a saved state; delete it and the shot starts over") from error
    if metadata.get("format") != FORMAT or metadata.get("sha256") != _digest(tensors):
        raise FarmError(f"{path}: got contents of another checksum or format; delete it and the shot starts over")
    last = metadata.get("channels_last", "").split()
    layouts = {name: LAST if name in last else torch.preserve_format for name in tensors}
    tensors = {name: tensor.to(device, memory_format=layouts[name]) for name, tensor in tensors.items()}
    caches = {
        cache: tuple(
            tensors[f"{cache}.{index}"].to(dtype) for index in range(sum(n.startswith(f"{cache}.") for n in tensors))
        )
        for cache in CACHES
    }
    plain = (tensors[name] for name in PLAIN)
    return Saved(tensors["motion"], SegmentState(int(metadata["segment"]), *plain, **caches))


def _named(saved: Saved) -> dict[str, Tensor]:
    """Every tensor by a name of its own."""
    tensors = {"motion": saved.motion, **{name: getattr(saved.state, name) for name in PLAIN}}
    for cache in CACHES:
        tensors |= {f"{cache}.{index}": tensor for index, tensor in enumerate(getattr(saved.state, cache))}
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # [bytes]
    return digest.hexdigest()
