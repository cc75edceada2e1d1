"""The trainings that make the shipped `nano` models, each a phase with its whole configuration.

A phase trains in FOLDER/NAME and reads the finished models of the phases before it from there:
vae1 and vae2 (each after its own -short), then stage1 (needs vae1), then stage2 (needs all).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.dit import DiT
from ..engine.presets import get_profile
from ..engine.profile import StageConfig
from ..engine.text import WordEncoder
from ..engine.vae import VAE
from ..engine.weights import fingerprint, load_dit, load_vae, load_words
from .batches import Crops, Cuts, Pool, Samples, latent_pool, mixed, photos_hash, video_batch
from .checkpoint import load_ema
from .clips import ClipConfig
from .flow import ClipBatch, LatentBatch, NoiseLevels, fuse
from .motion import MotionOdds
from .stage1 import Stage1Config, Stage1Task, stage1_batch
from .stage2 import Stage2Config, Stage2Task, stage2_batch
from .trainer import Task, TrainConfig, ship, step_seed
from .transition import StageOne
from .vae import VaeLoss, VaeTask, finished, new_vae, raw

Photos = Sequence[np.ndarray]
# Mostly one camera move at a time: a small model learns these before it learns everything at once.
ODDS = MotionOdds(
    moves=(0.12, 0.68, 0.17, 0.03), axes=(0.30, 0.22, 0.30, 0.08, 0.05, 0.05), shake=0.08, sprite=0.2, light=0.12
)
CLIPS = ClipConfig(odds=ODDS)  # 512x320, 33 frames, low resolution 128x80: the grids of `nano`
# Where the low resolution alone is wanted it is drawn at twice its size, not four times: as sharp, and 3 times faster.
LOW_CLIPS = ClipConfig(width=256, height=160, low_factor=2, odds=ODDS)
STATISTICS_BATCHES = 40  # over which a finished VAE's latents are measured


@dataclass(frozen=True)
class VaePhase:
    """One VAE; `low` trains it on the low resolution, in pixels of `LOW_CLIPS`."""

    train: TrainConfig
    samples: Samples
    cuts: Cuts  # of the samples
    low: bool
    after: str | None = None  # the phase whose finished weights it begins with
    decoder_only: bool = False  # the encoder stays, and so do the latents that DiTs were trained on
    loss: VaeLoss = field(default_factory=VaeLoss)


@dataclass(frozen=True)
class DitPhase:
    """One DiT, on samples of several sizes: whole pictures, and crops that cost less."""

    train: TrainConfig
    samples: tuple[Samples, ...]
    config: Stage1Config | Stage2Config


Phase = VaePhase | DitPhase
PHASES: dict[str, Phase] = {
    # Short pieces teach the picture in a third of the time; what follows a long past is learned from whole clips.
    "vae1-short": VaePhase(
        TrainConfig(1500, 4, lr=2e-3, muon=0.01, warmup=50, ema=0.998, save_every=500, bf16=True),
        Samples(Crops(4, 256, 160), 64, 12.0),
        Cuts(4, 64, 9),
        low=True,
    ),
    "vae2-short": VaePhase(
        TrainConfig(2000, 4, lr=2e-3, muon=0.01, warmup=50, ema=0.998, save_every=500, bf16=True),
        Samples(Crops(4, 128, 128), 64, 12.0),
        Cuts(4, 64, 9),
        low=False,
    ),
    "vae1": VaePhase(
        TrainConfig(2500, 2, lr=2e-3, muon=0.01, warmup=50, ema=0.998, save_every=500, bf16=True),
        Samples(Crops(2, 256, 160), 64, 12.0),
        Cuts(2, 48, 33),
        low=True,
        after="vae1-short",
    ),
    "vae2": VaePhase(
        TrainConfig(4000, 2, lr=2e-3, muon=0.01, warmup=50, ema=0.998, save_every=500, bf16=True),
        Samples(Crops(2, 128, 128), 64, 12.0),
        Cuts(2, 48, 33),
        low=False,
        after="vae2-short",
    ),
    "vae2-decoder": VaePhase(
        TrainConfig(3000, 2, lr=2e-3, muon=0.005, warmup=50, ema=0.998, save_every=500, bf16=True),
        Samples(Crops(2, 128, 128), 64, 12.0),
        Cuts(2, 64, 33),
        low=False,
        after="vae2",
        decoder_only=True,
    ),
    "stage1": DitPhase(
        TrainConfig(1800, 8, lr=2e-3, muon=0.01, warmup=50, ema=0.998, save_every=250, bf16=True),
        (Samples(Crops(8, 256, 160), 32, 24.0, 0.75), Samples(Crops(8, 192, 128), 16, 24.0, 0.25)),
        Stage1Config(),
    ),
    "stage2": DitPhase(
        TrainConfig(900, 2, lr=2e-3, muon=0.01, warmup=50, ema=0.998, save_every=250, bf16=True),
        (Samples(Crops(2, 384, 256), 16, 20.0, 0.85), Samples(Crops(2, 512, 320), 4, 20.0, 0.15)),
        Stage2Config(NoiseLevels(shift=3.0), own_context=0.1),
    ),
}


def train_task(
    name: str, photos: Photos, models: Path, phase: Phase, *, compiled: bool = False, start: Path | None = None
) -> Task:
    """The task of a phase on its device; finished models of the phases before it are read from `models`.

    Weights are new, or those of the folder `start`, which holds finished models too.
    """
    profile, train = get_profile("nano"), phase.train
    device, seed = train.device, step_seed(train.seed, name)
    begin = None if start is None else start / name
    if isinstance(phase, VaePhase) and phase.after is not None and begin is None:
        begin = models / phase.after
    # What a run is made of: to go on with other photographs or other models would be another run.
    settings: dict[str, Any] = {"start": None if begin is None else fingerprint(begin), "photos": photos_hash(photos)}
    settings["clips"] = asdict(_clips(phase))
    if isinstance(phase, VaePhase):
        vae = new_vae(_stage(phase).vae, seed) if begin is None else raw(load_vae(begin, dtype=torch.float32))
        settings |= {"samples": asdict(phase.samples), "cuts": asdict(phase.cuts)}
        vae.requires_grad_(True)
        if phase.decoder_only:
            vae.encoder.requires_grad_(False)
            vae.quant.requires_grad_(False)
        return VaeTask(vae.to(device), _videos(name, photos, phase), phase.loss, fuse=compiled, **settings)
    torch.manual_seed(seed)
    stage = _stage(phase)
    dit = DiT(stage.dit) if begin is None else load_dit(begin, dtype=torch.float32).requires_grad_(True)
    if compiled:
        fuse(dit)
    settings["samples"] = [asdict(item) for item in phase.samples]
    read = ["vae1"] if isinstance(phase.config, Stage1Config) else ["vae1", "stage1", "text", "vae2"]
    settings["models"] = fingerprint(*(models / item for item in read))
    if isinstance(phase.config, Stage1Config):
        vae1 = load_vae(models / "vae1", dtype=torch.float32, device=device)
        if start is None:
            words = WordEncoder(profile.text.vocabulary, stage.dit.text_dim, stage.dit.text_len)
        else:
            words = load_words(start / "text").requires_grad_(True)
        make = _pools(name, photos, phase, lambda clips, _: stage1_batch(vae1, clips))
        return Stage1Task(dit, words, make, phase.config, **settings)
    config = phase.config
    one = StageOne(
        load_dit(models / "stage1", dtype=torch.float32, device=device),
        load_words(models / "text", device=device),
        load_vae(models / "vae1", dtype=torch.float32, device=device),
    )
    vae2 = load_vae(models / "vae2", dtype=torch.float32, device=device)
    make = _pools(name, photos, phase, lambda clips, seed: stage2_batch(one, vae2, clips, config.transition, seed))
    return Stage2Task(dit, one.words, make, config, **settings)


def finish(name: str, photos: Photos, folder: Path, phase: Phase, models: Path) -> None:
    """Write the averaged weights of the training `folder`/NAME to `models`/NAME in bf16, Stage I's words beside it."""
    profile = get_profile("nano")
    if isinstance(phase, VaePhase):
        if phase.decoder_only:
            assert phase.after is not None
            vae = load_vae(models / phase.after, dtype=torch.float32)  # with the statistics of its latents
            load_ema(folder / name, {"vae": vae})
            ship(vae, models / name)
            return
        vae = VAE(_stage(phase).vae)
        load_ema(folder / name, {"vae": vae})
        phase = replace(phase, train=replace(phase.train, device="cpu"))
        make = _videos(f"{name}/statistics", photos, phase)
        videos = (make(0, step_seed(phase.train.seed, "statistics", i)) for i in range(STATISTICS_BATCHES))
        ship(finished(vae, videos), models / name)
        return
    stage = _stage(phase)
    modules: dict[str, nn.Module] = {name: DiT(stage.dit)}
    if name == "stage1":
        modules["text"] = WordEncoder(profile.text.vocabulary, stage.dit.text_dim, stage.dit.text_len)
    load_ema(folder / name, modules)
    for key, module in modules.items():
        ship(module, models / key)


def _low(phase: Phase) -> bool:
    """Whether the phase is one of Stage I, which sees the low resolution alone."""
    return phase.low if isinstance(phase, VaePhase) else isinstance(phase.config, Stage1Config)


def _stage(phase: Phase) -> StageConfig:
    profile = get_profile("nano")
    return profile.stage1 if _low(phase) else profile.stage2


def _clips(phase: Phase) -> ClipConfig:
    return LOW_CLIPS if _low(phase) else CLIPS


def _videos(name: str, photos: Photos, phase: VaePhase) -> Callable[[int, int], Tensor]:
    """Pieces of a pool of clips."""
    train, item = phase.train, phase.samples
    make = video_batch(photos, _clips(phase), replace(item.crops, count=1), train.device, low=phase.low)

    def sample(index: int) -> Tensor:
        return make(index, step_seed(train.seed, name, index)).half()

    pool = Pool(sample, item.crops.count, item.window, item.reuse, train.steps)
    return lambda step, seed: phase.cuts.take(pool(step, seed), seed)


def _pools(
    name: str, photos: Photos, phase: DitPhase, learn: Callable[[ClipBatch, int], LatentBatch]
) -> Callable[[int, int], LatentBatch]:
    """Batches from one pool for each size of samples; `learn(clip, seed)` encodes one clip."""
    pools = [
        latent_pool(photos, _clips(phase), item, phase.train, learn, name, item.crops.width) for item in phase.samples
    ]
    return mixed(pools, [item.share for item in phase.samples])
