"""The trainings that make the shipped `nano` models, each a phase with its whole configuration.

A phase trains in FOLDER/NAME and reads the finished models of the phases before it from there:
vae1 and vae2, then stage1 (needs vae1) and stage2 (needs all).
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.dit import DiT
from ..engine.presets import get_profile
from ..engine.profile import StageConfig
from ..engine.text import WordEncoder
from ..engine.vae import VAE
from ..engine.weights import fingerprint, load_dit, load_vae, load_words
from .batches import Crops, Cuts, Pool, Samples, latent_pool, mixed, photos_hash, sample_pool
from .checkpoint import load_ema
from .clips import ClipConfig, low_factor
from .components import fit_linear, freeze_linear, maps_hash
from .drawing import Drawer
from .flow import ClipBatch, LatentBatch, NoiseLevels, fuse
from .grow import grown
from .log import TrainingError
from .matching import MatchConfig
from .motion import MotionOdds
from .stage1 import Stage1Config, Stage1Task, stage1_batch
from .stage2 import Stage2Config, Stage2Task, stage2_batch
from .trainer import Task, TrainConfig, ship, step_seed
from .transition import StageOne, TransitionConfig
from .vae import VaeLoss, VaeTask, finished, new_vae, raw

# Mostly one camera move at a time: a small model learns these before it learns everything at once.
ODDS = MotionOdds(
    moves=(0.12, 0.68, 0.17, 0.03), axes=(0.30, 0.22, 0.30, 0.08, 0.05, 0.05), shake=0.08, sprite=0.2, light=0.12
)
NANO = get_profile("nano")
WHOLE = (NANO.width, NANO.height)
CLIPS = ClipConfig(NANO.width, NANO.height, NANO.frames, low_factor(NANO), turn=0.5, swap=0.5, blend=0.25, odds=ODDS)
STATISTICS_PIECES, STATISTICS_STRIDE = 256, 8  # of a VAE's pixels and latents; steps between batches, for other clips


@dataclass(frozen=True)
class VaePhase:
    """One VAE; `low` trains it on the low resolution, in pixels of its size."""

    train: TrainConfig
    samples: Samples
    cuts: Cuts  # of the samples
    low: bool
    loss: VaeLoss = field(default_factory=VaeLoss)


@dataclass(frozen=True)
class DitPhase:
    """One DiT, on samples of several sizes: whole pictures, and crops that cost less."""

    train: TrainConfig
    samples: tuple[Samples, ...]
    config: Stage1Config | Stage2Config


Phase = VaePhase | DitPhase
MATCHING = MatchConfig(weight=0.05)
# Stage transition asks for levels of 0.1 to 0.5, which Stage I's own schedule leaves out.
STAGE1 = Stage1Config(NoiseLevels(between=1.0).at(NANO.stage1), matching=MATCHING)
STAGE2 = Stage2Config(
    NoiseLevels().at(NANO.stage2), TransitionConfig().at(NANO.stage1), own_context=0.15, matching=MATCHING
)
PHASES: dict[str, Phase] = {
    "vae1": VaePhase(
        TrainConfig(1500, 64, lr=2e-3, muon=0.01, warmup=50, ema=0.998, save_every=500, bf16=True),
        Samples(Crops(64, *WHOLE), 128, 48.0, group=8),
        Cuts(64, 40, 33),
        low=True,
    ),
    "vae2": VaePhase(
        TrainConfig(2000, 48, lr=2e-3, muon=0.01, warmup=50, ema=0.998, save_every=500, bf16=True),
        Samples(Crops(48, 128, 128), 128, 24.0, group=8),
        Cuts(48, 48, 33),
        low=False,
    ),
    "stage1": DitPhase(
        TrainConfig(3000, 96, lr=2e-3, muon=0.01, warmup=50, ema=0.998, save_every=500, bf16=True),
        (Samples(Crops(96, *WHOLE), 512, 96.0, 0.75, 16), Samples(Crops(96, 192, 128), 256, 96.0, 0.25, 16)),
        STAGE1,
    ),
    "stage2": DitPhase(
        TrainConfig(5000, 48, lr=2e-3, muon=0.01, warmup=50, ema=0.998, save_every=500, bf16=True),
        (
            Samples(Crops(48, 128, 128), 192, 20.0, 0.3, 16),
            Samples(Crops(48, 192, 128), 192, 20.0, 0.3, 16),
            Samples(Crops(24, *WHOLE), 96, 20.0, 0.4, 8),
        ),
        STAGE2,
    ),
}


def with_batch(phase: Phase, count: int) -> Phase:
    """The phase with `count` clips a step; where it has samples of another size too, those change in proportion."""
    old = phase.train.batch

    def scaled(number: int) -> int:
        return max(1, round(number * count / old))

    def sample(item: Samples) -> Samples:
        crops = replace(item.crops, count=scaled(item.crops.count))
        return replace(item, crops=crops, group=min(item.group, crops.count))

    phase = replace(phase, train=replace(phase.train, batch=count))
    if isinstance(phase, DitPhase):
        return replace(phase, samples=tuple(sample(item) for item in phase.samples))
    cuts = replace(phase.cuts, count=scaled(phase.cuts.count))
    return replace(phase, samples=sample(phase.samples), cuts=cuts)


def train_task(
    name: str,
    drawer: Drawer,
    models: Path,
    phase: Phase,
    *,
    compiled: bool = False,
    start: Path | None = None,
) -> Task:
    """The task of a phase on its device; finished models of the phases before it are read from `models`.

    Weights are new, or those of the folder `start`, which holds finished models too.
    """
    begin = None if start is None else start / name
    # What a run is made of: to go on with other photographs or other models would be another run.
    settings: dict[str, Any] = {"start": None if begin is None else fingerprint(begin)}
    settings |= {"photos": photos_hash(drawer.photos), "clips": asdict(CLIPS)}
    if isinstance(phase, VaePhase):
        return _vae_task(name, drawer, phase, begin, compiled, settings)
    return _dit_task(name, drawer, models, phase, begin, compiled, settings)


def _vae_task(
    name: str, drawer: Drawer, phase: VaePhase, begin: Path | None, compiled: bool, settings: dict[str, Any]
) -> Task:
    """The task of one of the VAEs."""
    if begin is None:
        vae = new_vae(_stage(phase).vae, step_seed(phase.train.seed, name))
    else:
        vae = raw(load_vae(begin, dtype=torch.float32))
    settings |= {"samples": asdict(phase.samples), "cuts": asdict(phase.cuts)}
    if vae.config.linear:
        settings["maps"] = maps_hash(vae)
    vae.requires_grad_(True).to(phase.train.device)
    freeze_linear(vae)
    pool, cuts = _videos(name, drawer, phase), phase.cuts
    return VaeTask(vae, lambda step, seed: cuts.take(pool(step, seed), seed), phase.loss, fuse=compiled, **settings)


def _dit_task(
    name: str,
    drawer: Drawer,
    models: Path,
    phase: DitPhase,
    begin: Path | None,
    compiled: bool,
    settings: dict[str, Any],
) -> Task:
    """The task of one of the DiTs, on latents of the finished VAEs in `models`."""
    config, device, stage = phase.config, phase.train.device, _stage(phase)
    alone = isinstance(config, Stage2Config) and config.transition.probability == 0  # Stage I has no hand in it
    read = ["vae1"] if _low(phase) else ["vae1", "stage1", "text", "vae2"]
    if alone:
        read.remove("stage1")
    settings |= {
        "models": fingerprint(*(models / item for item in read)),
        "samples": [asdict(item) for item in phase.samples],
    }
    vae1 = _finished_vae(models / "vae1", NANO.stage1, device)
    torch.manual_seed(step_seed(phase.train.seed, name))
    if begin is None:
        dit = DiT(stage.dit)
    else:
        dit = grown(load_dit(begin, dtype=torch.float32), stage.dit).requires_grad_(True)
    if compiled:
        fuse(dit)
    if isinstance(config, Stage1Config):
        if begin is None:
            words = WordEncoder(NANO.text.vocabulary, stage.dit.text_dim, stage.dit.text_len)
        else:
            words = load_words(begin.parent / "text").requires_grad_(True)
        make = _pools(name, drawer, phase, lambda clips, _: stage1_batch(vae1, clips))
        return Stage1Task(dit, words, make, config, **settings)
    first = None if alone else load_dit(models / "stage1", dtype=torch.float32, device=device)
    one = StageOne(first, load_words(models / "text", device=device), vae1)
    vae2 = _finished_vae(models / "vae2", NANO.stage2, device)
    make = _pools(name, drawer, phase, lambda clips, seed: stage2_batch(one, vae2, clips, config.transition, seed))
    return Stage2Task(dit, one.words, make, config, **settings)


def _finished_vae(path: Path, stage: StageConfig, device: str) -> VAE:
    """A VAE whose latents are those the profile's DiT reads. TrainingError for another number of channels."""
    vae = load_vae(path, dtype=torch.float32, device=device)
    got, want = vae.config.latent_channels, stage.vae.latent_channels
    if got != want:
        raise TrainingError(f"{path}: got {got} latent channels, want {want} as the profile nano has; train it again")
    return vae


def fit(name: str, drawer: Drawer, phase: VaePhase, models: Path, like: Path | None = None) -> None:
    """Write the phase's VAE to `models`/NAME in bf16, with linear maps fitted to its samples; nothing is trained.

    Its latents resemble those of the VAE in the folder `like`. Its network is narrow, and adds nothing yet.
    """
    vae = _stage(phase).vae
    narrow = {"encoder_dim": vae.encoder_dim // 4, "decoder_dim": vae.decoder_dim // 2, "mult": (1, 2, 2)}
    made = new_vae(replace(vae, linear=True, **narrow), step_seed(phase.train.seed, name)).to(phase.train.device)
    known = None if like is None else load_vae(like / name, dtype=torch.float32, device=phase.train.device)
    pieces = [piece.to(phase.train.device) for piece in _statistics(name, drawer, phase)]
    fit_linear(made, pieces, known)
    ship(finished(made, pieces), models / name)


def finish(name: str, task: Task, drawer: Drawer, folder: Path, phase: Phase, models: Path) -> None:
    """Write the averaged weights of the training `folder`/NAME to `models`/NAME in bf16, Stage I's words beside it.

    They take the place of the task's own.
    """
    load_ema(folder / name, task.modules)
    if isinstance(phase, DitPhase):
        for key, module in task.modules.items():
            ship(module, models / key)
        return
    vae = task.modules["vae"]
    assert isinstance(vae, VAE)
    ship(finished(vae, _statistics(name, drawer, phase)), models / name)


def _low(phase: Phase) -> bool:
    """Whether the phase is one of Stage I, which sees the low resolution alone."""
    return phase.low if isinstance(phase, VaePhase) else isinstance(phase.config, Stage1Config)


def _stage(phase: Phase) -> StageConfig:
    return NANO.stage1 if _low(phase) else NANO.stage2


def _statistics(name: str, drawer: Drawer, phase: VaePhase) -> Iterator[Tensor]:
    """Pieces to measure, always the same."""
    steps = range(0, STATISTICS_STRIDE * max(1, STATISTICS_PIECES // phase.cuts.count), STATISTICS_STRIDE)
    pool = _videos(f"{name}/statistics", drawer, replace(phase, train=replace(phase.train, steps=steps.stop)))
    try:
        for step in steps:
            seed = step_seed(phase.train.seed, "statistics", step)
            yield phase.cuts.take(pool(step, seed), seed)
    finally:
        pool.close()


def _videos(name: str, drawer: Drawer, phase: VaePhase) -> Pool[Tensor]:
    """A pool of clips."""

    def learn(clips: ClipBatch, _: int) -> list[Tensor]:
        return list((clips.low if phase.low else clips.high).half().split(1))

    return sample_pool(drawer, CLIPS, phase.samples, phase.train, learn, name)


def _pools(
    name: str, drawer: Drawer, phase: DitPhase, learn: Callable[[ClipBatch, int], LatentBatch]
) -> Callable[[int, int], LatentBatch]:
    """Batches from one pool for each size of samples; `learn(clips, seed)` encodes a group."""
    pools = [
        latent_pool(drawer, CLIPS, item, phase.train, learn, phase.train.device, name, item.crops.width)
        for item in phase.samples
    ]
    return mixed(pools, [item.share for item in phase.samples])
