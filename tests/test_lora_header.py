"""LoRA files that keep one rank and alpha in their header, as PEFT and diffusers write them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import TINY

from swifti2v.engine.dit import DiT
from swifti2v.engine.errors import WeightsError
from swifti2v.engine.weights import load_dit, save_dit

KEY = "transformer.blocks.0.attn1.to_v"


def merged(folder: Path, settings: dict) -> torch.Tensor:
    torch.manual_seed(0)
    base = DiT(TINY)
    save_dit(base, folder / "base")
    tensors = {f"{KEY}.lora_A.weight": torch.ones(2, 24), f"{KEY}.lora_B.weight": torch.ones(24, 2)}
    save_file(tensors, folder / "l.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    dit = load_dit(folder / "base", loras=[(folder / "l.safetensors", 1.0)])
    name = "blocks.0.self_attn.v.weight"
    return dit.state_dict()[name] - base.state_dict()[name]


def test_the_headers_alpha_scales_the_pairs(tmp_path: Path):
    delta = merged(tmp_path, {"transformer.r": 2, "transformer.lora_alpha": 8})
    assert torch.allclose(delta, torch.full((24, 24), 2 * 8 / 2.0), atol=1e-5)


def test_settings_that_differ_by_layer_are_refused(tmp_path: Path):
    with pytest.raises(WeightsError, match=r"settings beyond one rank and alpha.*'alpha_pattern'"):
        merged(tmp_path, {"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"to_q": 4}})
