"""The trainings that make the shipped `nano` models, each a phase with its whole configuration.

A phase trains in FOLDER/NAME and reads the finished phases before it from FOLDER/NAME of theirs:
vae1 and vae2 (independent), then stage1 (needs vae1), then stage2 (needs all).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.dit import DiT
from ..engine.presets import get_profile
from ..engine.text import WordEncoder
from ..engine.vae import VAE
from .batches import Ahead, Crops, clip_batch, video_batch
from .clips import ClipConfig
from .stage1 import Stage1Config, Stage1Task
from .stage2 import Stage2Config, Stage2Task
from .trainer import Task, TrainConfig, load_ema, step_seed
from .transition import StageOne
from .vae import VaeLoss, VaeTask, finished, new_vae

Photos = Sequence[np.ndarray]
CLIPS = ClipConfig()  # 512x320, 33 frames, low resolution 128x80: the grids of `nano`
STATISTICS_CLIPS = 48  # over which a finished VAE's latents are measured


@dataclass(frozen=True)
class VaePhase:
    """One VAE; `low` trains it on the low resolution, with crops still given in pixels of the high one."""

    train: TrainConfig
    crops: Crops
    low: bool
    loss: VaeLoss = field(default_factory=VaeLoss)


@dataclass(frozen=True)
class Stage1Phase:
    """Stage I with the word encoder, on whole pictures and on crops (`crops`, in pixels of the high resolution)."""

    train: TrainConfig
    crops: Crops
    config: Stage1Config = field(default_factory=Stage1Config)


@dataclass(frozen=True)
class Stage2Phase:
    """Stage II on crops."""

    train: TrainConfig
    crops: Crops
    config: Stage2Config = field(default_factory=Stage2Config)


Phase = VaePhase | Stage1Phase | Stage2Phase
PHASES: dict[str, Phase] = {
    "vae1": VaePhase(
        TrainConfig(3000, 8, lr=1e-3, warmup=100, ema=0.998, save_every=250, bf16=True),
        Crops(2, 256, 256, frames=9, cuts=4),
        low=True,
    ),
    "vae2": VaePhase(
        TrainConfig(4000, 8, lr=1e-3, warmup=100, ema=0.998, save_every=250, bf16=True),
        Crops(4, 64, 64, frames=9, cuts=2),
        low=False,
    ),
    "stage1": Stage1Phase(
        TrainConfig(6000, 4, lr=1e-3, warmup=100, ema=0.998, save_every=250, bf16=True),
        Crops(4, 512, 320),
    ),
    "stage2": Stage2Phase(
        TrainConfig(3000, 4, lr=1e-3, warmup=100, ema=0.998, save_every=100, bf16=True),
        Crops(4, 128, 128),
    ),
}


def train_task(name: str, photos: Photos, folder: Path, phase: Phase, *, fuse: bool) -> Task:
    """The task of a phase on its device, its frozen models read from the phases in `folder`."""
    profile, train = get_profile("nano"), phase.train
    if isinstance(phase, VaePhase):
        stage = profile.stage1 if phase.low else profile.stage2
        vae = new_vae(stage.vae, step_seed(train.seed, name)).to(train.device)
        make = video_batch(photos, CLIPS, phase.crops, train.device, low=phase.low)
        return VaeTask(vae, Ahead(make, train.seed), phase.loss, fuse=fuse, crops=asdict(phase.crops))
    raise NotImplementedError
