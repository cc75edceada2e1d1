"""What tests of the encoders share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def randomise(model: Any, spread: float) -> Any:
    """Every parameter away from its default, or norms of 1 and biases of 0 hide mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and "bias" not in name else 0.0, spread)
    return model.eval()


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(path)
    change(state)
    save_file({key: tensor.clone() for key, tensor in state.items()}, path)
