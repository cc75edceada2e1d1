"""Running a profile's DiTs with the fused kernels, and attention with what was measured to be fastest on this GPU."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from ..engine.errors import EnvironmentMismatch
from ..engine.profile import Profile, StageConfig
from ..kernels.dispatch import DTYPES, ChoiceTable, Shape, measure
from ..kernels.kernel_set import KernelSet, fused
from .sidecar import write_json

TABLE = "attention.json"


def use_fused(
    profile: Profile, modules: Mapping[str, nn.Module], device: torch.device, dtype: torch.dtype, folder: Path
) -> ChoiceTable:
    """Give the DiTs among `modules` the fused kernels. Returns how attention is run, for each shape.

    Attention is measured once for a shape and GPU, seconds each at 2K, and kept in `folder`/attention.json.
    EnvironmentMismatch without a CUDA device or Triton.
    """
    if device.type != "cuda" or find_spec("triton") is None:
        raise EnvironmentMismatch(
            f"fused kernels: got {device} and {'a' if find_spec('triton') else 'no'} triton, want a CUDA device and "
            "triton; run without them, or pip install 'swifti2v[triton]'"
        )
    gpu, path = torch.cuda.get_device_name(device), folder / TABLE
    table = read_table(path)
    missing = [shape for shape in attention_shapes(profile, dtype) if table.find(shape, gpu) is None]
    for shape in missing:
        table = table.add(measure(shape, device))
    if missing:
        write_json(path, {"choices": table.to_plain()})
    give_kernels(modules, fused(table, gpu))
    return table


def give_kernels(modules: Mapping[str, nn.Module], kernels: KernelSet) -> None:
    """Set the kernels of every layer that runs by them."""
    for module in modules.values():
        for layer in module.modules():
            if isinstance(getattr(layer, "kernels", None), KernelSet):
                setattr(layer, "kernels", kernels)  # noqa: B010  (a type checker takes a module's attributes for modules)


def read_table(path: Path) -> ChoiceTable:
    """What was measured before; nothing where the file is missing or of another version: it is measured anew then."""
    try:
        return ChoiceTable.from_plain(json.loads(path.read_text())["choices"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return ChoiceTable()


def attention_shapes(profile: Profile, dtype: torch.dtype) -> tuple[Shape, ...]:
    """Every attention of the profile's steps, each once: whole windows, the last layer's kept blocks, and the text."""
    name = next(name for name, other in DTYPES.items() if other == dtype)
    shapes = _window_shapes(profile.stage1, profile.blocks, profile.blocks, name)
    for window in profile.windows:
        shapes += _window_shapes(profile.stage2, window, profile.noisy, name)
    return tuple(dict.fromkeys(shapes))


def _window_shapes(stage: StageConfig, blocks: int, keep: int, dtype: str) -> list[Shape]:
    dit = stage.dit
    tokens = blocks * stage.block_tokens
    context = [dit.text_len, dit.image_tokens] if dit.image_dim else [dit.text_len]
    return [
        Shape(1, dit.heads, queries, keys, 0, dit.head_dim, dtype)
        for queries in (tokens, keep * stage.block_tokens)
        for keys in (tokens, *context)
    ]
