"""Small clips and models to train both stages on, their tasks, and the first stage that transition runs."""

from collections.abc import Iterable
from math import log10

import torch
from torch import Tensor, nn

from swifti2v.engine.dit import DiT
from swifti2v.engine.profile import Profile
from swifti2v.engine.text import WordEncoder
from swifti2v.engine.vae import VAE
from swifti2v.training.flow import ClipBatch
from swifti2v.training.stage1 import Stage1Config, Stage1Task, stage1_batch
from swifti2v.training.stage2 import Stage2Config, Stage2Task, stage2_batch
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


def stage_parts(profile: Profile, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules and a word encoder, the same each time; both DiTs are to be trained."""
    torch.manual_seed(0)
    dit = profile.stage1.dit
    words = WordEncoder(profile.text.vocabulary, dit.text_dim, dit.text_len)
    for name in ("stage1", "stage2"):
        modules[name].requires_grad_(True)
    return {**modules, "words": words}


def stage1_task(one: StageOne, **config) -> Stage1Task:
    assert one.dit is not None
    return Stage1Task(
        one.dit, one.words, lambda step, seed: stage1_batch(one.vae, clips(step, seed)), Stage1Config(**config)
    )


def stage2_task(parts: dict[str, nn.Module], **config) -> Stage2Task:
    dit, vae = parts["stage2"], parts["vae2"]
    assert isinstance(dit, DiT)
    assert isinstance(vae, VAE)
    one, settings = stage_one(parts), Stage2Config(**config)
    return Stage2Task(
        dit,
        one.words,
        lambda step, seed: stage2_batch(one, vae, clips(step, seed), settings.transition, seed),
        settings,
    )


@torch.no_grad()
def round_trip_psnr(vae: VAE, videos: Iterable[Tensor]) -> float:
    """PSNR in dB of decoding what was encoded, squared error pooled over all videos [B, 3, 1 + 4k, H, W] in [-1, 1]."""
    error, count = 0.0, 0
    for video in videos:
        clip = video.to(vae.mean.device)
        error += float((vae.decode(vae.encode(clip)).float() - clip).double().square().sum())
        count += clip.numel()
    return 10 * log10(4 * count / max(error, 1e-12))
