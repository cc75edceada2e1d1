"""The checkpoint file of a training: how it is read, and what must fit."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .log import Record, TrainingError

CHECKPOINT = "checkpoint.safetensors"
FORMAT = "2"


def load_ema(folder: Path, modules: Mapping[str, nn.Module]) -> int:
    """Put the averaged weights of a training folder into its modules; returns the step they are of.

    `modules` are named as in the task. Parameters that were not trained keep their values; TrainingError where the
    checkpoint holds a tensor that the modules lack or that has another shape.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise TrainingError(f"{path}: got no such file, want a training's checkpoint; train first")
    tensors, metadata = read_checkpoint(path, prefix="ema.")
    own = {f"ema.{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
    have = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_shapes(path, have, {name: tuple(own[name].shape) for name in own if name in have})
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return int(json.loads(metadata["state"])["step"])


def read_checkpoint(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path}: got an unreadable file ({error}), want a checkpoint; delete it") from error
    if metadata.get("swifti2v_training") != FORMAT:
        raise TrainingError(
            f"{path}: got format {metadata.get('swifti2v_training')}, want {FORMAT}; train in another folder"
        )
    return tensors, metadata


def check_identity(path: Path, have: Record, want: Record) -> None:
    """Refuse to resume a run with other settings; more steps than it had are fine."""
    names = [*want, *(name for name in have if name not in want)]
    differ = [n for n in names if have.get(n) != want.get(n) and not (n == "steps" and want[n] > have[n])]
    if differ:
        got = ", ".join(f"{name} {have.get(name)!r}" for name in differ[:5])
        wish = ", ".join(f"{name} {want.get(name)!r}" for name in differ[:5])
        raise TrainingError(f"{path}: got a run with {got}, want {wish}; keep the settings or train in another folder")


def check_shapes(path: Path, have: Mapping[str, tuple[int, ...]], want: Mapping[str, tuple[int, ...]]) -> None:
    wrong = sorted(name for name in {*have, *want} if have.get(name) != want.get(name))
    if wrong:
        name = wrong[0]
        raise TrainingError(
            f"{path}: got {name} {have.get(name)} and {len(wrong) - 1} more that differ, want {want.get(name)}; "
            "use the modules it was trained with"
        )
