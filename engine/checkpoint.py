"""A checkpoint once it is open: its tensors, one by one, and what makes it one we take. Opens nothing itself."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import WeightsError

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
NESTED = ("state_dict", "model", "module")  # where trainers put the weights inside a pickle
# Subfolders under which public repositories keep the two experts of one model: (high noise, low noise).
EXPERT_FOLDERS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))


def find_entry(folder: Path, name: str) -> Path | None:
    """The entry of a model folder: NAME/ or NAME.safetensors; None where there is neither."""
    return next((path for path in (folder / name, folder / f"{name}.safetensors") if path.exists()), None)


def find_experts(folder: Path) -> tuple[Path, Path] | None:
    """The folders of both experts, high noise and low, inside one of Stage I; None where it has no two."""
    pairs = ((folder / high, folder / low) for high, low in EXPERT_FOLDERS)
    return next((pair for pair in pairs if all(path.is_dir() for path in pair)), None)


class State(Mapping[str, Tensor]):
    """The tensors of a checkpoint, each read when asked for, and the parsed config.json beside them ({} if none)."""

    def __init__(
        self, source: str, config: Mapping[str, Any], files: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> None:
        self.source = source
        self.config = config
        self.metadata = metadata  # of a single file's header
        self._files = files  # tensor name -> open file

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype of a tensor in safetensors' words (`BF16`), without reading it."""
        return self._files[name].get_slice(name).get_dtype()


def shard_table(value: Mapping[str, Any], index: Path) -> dict[str, str]:
    """Tensor name -> file name of an index, which may name files of its own folder only."""
    shards = value.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise WeightsError(f"{index}: got no weight_map of names, want an index of safetensors; fetch it again")
    for name in shards.values():
        if name in ("", ".", "..") or set(name) & set("/\\:\0") or not name.endswith(".safetensors"):
            raise WeightsError(f"{index}: got the file {name!r}, want a .safetensors beside it; do not use this index")
    return shards


def foreign_file(path: Path) -> str:
    """What to say of a file that is not safetensors."""
    if not path.exists():
        return f"{path}: got no such file or folder, want a checkpoint; correct the path"
    if path.suffix in PICKLES:
        return f"{path}: got a pickle, which can run code, want safetensors; run `swifti2v convert {path.name}` once"
    if path.suffix == ".gguf":
        return f"{path}: got a quantised GGUF file, want safetensors in fp32, fp16 or bf16; use the original checkpoint"
    return f"{path}: got no checkpoint, want a .safetensors file or a folder that holds one; pass another file"


def flat_tensors(value: object, path: Path) -> dict[str, Tensor]:
    """The state dict in a pickle, every tensor contiguous and in memory of its own."""
    found = value if isinstance(value, dict) else {}
    for _ in NESTED:  # at most one in another
        found = next((found[key] for key in NESTED if isinstance(found.get(key), dict)), found)
    foreign = [
        f"{name!r} ({type(tensor).__name__})"
        for name, tensor in found.items()
        if not (isinstance(name, str) and isinstance(tensor, Tensor) and _dense(tensor))
    ]
    if not found or foreign:
        what = f"{len(foreign)} entries such as {', '.join(foreign[:5])}" if foreign else type(value).__name__
        raise WeightsError(f"{path}: got {what}, want a flat dict of dense tensors; convert the weights alone")
    tensors, seen = {}, set()
    for name, tensor in found.items():
        kept = tensor.detach().contiguous()
        place = kept.untyped_storage().data_ptr()
        tensors[name] = kept.clone() if place in seen else kept
        seen.add(place)
    return tensors


def _dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).splitlines() or [type(error).__name__])[0]
