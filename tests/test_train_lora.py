"""LoRA training: starts from the model itself, changes the pairs alone, and the file merges to the same model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from swifti2v.engine.dit import DiT
from swifti2v.engine.errors import WeightsError
from swifti2v.engine.profile import DiTConfig
from swifti2v.engine.weights import load_dit, save_dit
from swifti2v.training.lora import Lora, checkpoint_blocks

CONFIG = DiTConfig(48, 96, 4, 3, 6, 6, text_dim=16, text_len=8, freq_dim=32)


def model(tmp_path: Path) -> DiT:
    torch.manual_seed(0)
    save_dit(DiT(CONFIG), tmp_path / "base")
    return load_dit(tmp_path / "base")


def run(dit: DiT, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    latents, text = torch.randn(2, 6, 3, 4, 6, generator=generator), torch.randn(2, 8, 16, generator=generator)
    return dit.denoise(latents, torch.tensor([[0.0, 500, 500], [0, 900, 900]]), text)


def train(dit: DiT, lora: Lora, steps: int = 5) -> list[float]:
    optimizer, losses = torch.optim.Adam(lora.parameters(), lr=0.02), []
    for _ in range(steps):
        loss = (run(dit) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_file_merges_to_the_trained_model(tmp_path: Path):
    dit = model(tmp_path)
    base = run(dit)
    lora = Lora(dit, rank=4, alpha=8.0)
    assert torch.equal(run(dit), base), "it starts from the model itself"
    losses = train(dit, lora)
    assert losses[-1] < 0.8 * losses[0]
    save_file(lora.tensors(), tmp_path / "lora.safetensors")
    merged = load_dit(tmp_path / "base", loras=[(tmp_path / "lora.safetensors", 1.0)])
    with torch.no_grad():
        assert torch.allclose(run(merged), run(dit), atol=1e-5)
        assert (run(merged) - base).norm() / base.norm() > 0.05
    lora.remove()
    assert torch.equal(run(dit), base), "the model itself is as it was"


def test_only_the_pairs_learn(tmp_path: Path):
    dit = model(tmp_path)
    lora = Lora(dit, rank=2, alpha=2.0, targets=r"blocks\.1\.self_attn\.[qv]")
    assert sorted(lora.pairs) == ["blocks/1/self_attn/q", "blocks/1/self_attn/v"]
    train(dit, lora, 1)
    assert all(parameter.grad is None for parameter in dit.parameters())
    assert all(parameter.grad is not None for parameter in lora.parameters())


def test_targets_that_match_nothing_are_refused(tmp_path: Path):
    with pytest.raises(WeightsError, match="want a pattern of layer names"):
        Lora(model(tmp_path), targets="to_q")


def test_checkpointed_blocks_give_the_same_gradients(tmp_path: Path):
    plain, saving = model(tmp_path), model(tmp_path)
    checkpoint_blocks(saving)
    for dit in (plain, saving):
        dit.requires_grad_(True)
        run(dit).square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if one.grad is not None:
            assert other.grad is not None, name
            assert torch.allclose(one.grad, other.grad, atol=1e-6), name
