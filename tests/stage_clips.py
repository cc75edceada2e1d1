"""Small clips to train both stages on, and the first stage that transition runs."""

import torch
from torch import nn

from swifti2v.engine.dit import DiT
from swifti2v.engine.text import WordEncoder
from swifti2v.engine.vae import VAE
from swifti2v.training.flow import ClipBatch
from swifti2v.training.transition import StageOne

FRAMES = 21


def clips(step: int, seed: int, count: int = 2) -> ClipBatch:
    """Drifting sine waves, high 64x128 and low 16x32, a function of (step, seed)."""
    generator = torch.Generator().manual_seed(1000 * step + seed)
    phase = torch.rand(count, 3, 1, 1, 1, generator=generator) * 6
    t = torch.arange(FRAMES).view(1, 1, -1, 1, 1) * 0.3
    y, x = torch.arange(64).view(1, 1, 1, -1, 1) * 0.2, torch.arange(128).view(1, 1, 1, 1, -1) * 0.1
    high = torch.sin(phase + t + y + x) * 0.8
    low = high.unflatten(4, (32, 4)).unflatten(3, (16, 4)).mean(dim=(4, 6))  # [B, 3, T, 16, 4, 32, 4] -> [.., 16, 32]
    return ClipBatch(high, low, ["camera pans left", "zoom in"][:count])


def stage_one(parts: dict[str, nn.Module]) -> StageOne:
    dit, words, vae = parts["stage1"], parts["words"], parts["vae1"]
    assert isinstance(dit, DiT)
    assert isinstance(words, WordEncoder)
    assert isinstance(vae, VAE)
    return StageOne(dit, words, vae)
