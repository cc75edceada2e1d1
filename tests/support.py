"""What the tests of checkpoints share: a tiny model's sizes, writing files, comparing models, catching refusals."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from swifti2v.engine.dit import DiT
from swifti2v.engine.errors import WeightsError
from swifti2v.engine.profile import DiTConfig
from swifti2v.engine.weights import load_dit, save_dit

TINY = DiTConfig(
    dim=24, ffn_dim=40, heads=2, layers=2, in_channels=6, out_channels=6, text_dim=16, text_len=8, freq_dim=32
)


def same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    """Both models hold the same tensors under the same names."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0, msg=name)


def write(path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    if config is not None:
        (path.parent / "config.json").write_text(json.dumps(config))
    return path


def original_dit(model: DiT, folder: Path) -> dict[str, Tensor]:
    """The tensors in the original layout, as a file holds them."""
    return load_file(save_dit(model, folder / "original"))


def refused(path: Path, *words: str, load: Callable[..., Any] = load_dit, **options: Any) -> str:
    """The text of the refusal, one line that has all the words."""
    with pytest.raises(WeightsError) as caught:
        load(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert re.search(r": got .+, want .+; .+", text), text
    for word in words:
        assert word in text, text
    return text
