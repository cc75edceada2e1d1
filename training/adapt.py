"""LoRA training of either stage of any profile on clips drawn over photographs: how a Wan-sized model is adapted."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..engine.dit import DiT
from ..engine.errors import WeightsError
from ..engine.profile import Profile
from ..engine.weights import fingerprint, load_dit, load_vae, load_words
from .batches import Crops, Samples, latent_pool, photos_hash
from .clips import ClipConfig
from .log import TrainingError
from .lora import TARGETS, Lora, checkpoint_blocks
from .stage1 import FixedText, Stage1Config, Stage1Task, TextEncoder, stage1_batch
from .stage2 import Stage2Config, Stage2Task, stage2_batch
from .trainer import TrainConfig, step_seed
from .transition import StageOne

Stage = Literal["stage1", "stage2"]


@dataclass(frozen=True)
class AdaptConfig:
    """A LoRA and what it is trained on; samples are whole pictures unless `crops` says otherwise."""

    train: TrainConfig
    rank: int = 32
    alpha: float = 32.0
    targets: str = TARGETS
    crops: Crops | None = None
    window: int = 8  # samples that a step chooses from
    reuse: float = 8.0
    checkpointing: bool = True
    stage1: Stage1Config = field(default_factory=lambda: Stage1Config(drop_prompt=0.0))
    stage2: Stage2Config = field(default_factory=Stage2Config)


class LoraTask:
    """A stage's task with its DiT frozen: only the pairs beside it learn."""

    def __init__(self, task: Stage1Task | Stage2Task, config: AdaptConfig) -> None:
        self.task = task
        self.lora = Lora(task.dit, config.rank, config.alpha, config.targets).to(config.train.device)
        self.modules: dict[str, nn.Module] = {"lora": self.lora}
        lora = {"rank": config.rank, "alpha": config.alpha, "targets": config.targets}
        self.settings = {**task.settings, "lora": lora}
        if config.checkpointing:
            checkpoint_blocks(task.dit)

    def loss(self, step: int, seed: int) -> tuple[Tensor, dict[str, float]]:
        """The stage's own loss."""
        return self.task.loss(step, seed)


def adapt_task(
    profile: Profile, stage: Stage, models: Path, photos: Sequence[np.ndarray], config: AdaptConfig,
    embeddings: Path | None = None,
) -> LoraTask:  # fmt: skip
    """The task of a LoRA for `stage`, on the models in the folder `models`.

    The text encoder is models/text, or the tensor `prompt` of the file `embeddings` for every clip. Stage II needs
    Stage I only where its transition has a probability. WeightsError for a Stage I that reads CLIP image tokens.
    """
    train, dtype = config.train, torch.bfloat16 if config.train.bf16 else torch.float32
    here: dict[str, Any] = {"dtype": dtype, "device": train.device}
    text = _text(models, embeddings, train.device)
    big, small = profile.stage2, profile.stage1
    clips = ClipConfig(big.width, big.height, profile.frames, low_factor=big.width // small.width)
    crops = config.crops or Crops(train.batch, big.width, big.height)
    samples = Samples(crops, config.window, config.reuse)
    vae1 = load_vae(models / "vae1", **here)
    torch.manual_seed(step_seed(train.seed, "lora"))
    settings: dict[str, Any] = {"profile": profile.name, "crops": asdict(crops), "reuse": config.reuse}
    settings |= {"clips": asdict(clips), "photos": photos_hash(photos)}
    config = _on_schedule(config, profile)
    if stage == "stage1":
        dit = _stage1(models, here)
        settings["models"] = fingerprint(models / "stage1", models / "vae1")
        batch = latent_pool(photos, clips, samples, train, lambda clip, _: stage1_batch(vae1, clip), "sample")
        return LoraTask(Stage1Task(dit, text, batch, config.stage1, **settings), config)
    transition = config.stage2.transition
    one = StageOne(_stage1(models, here) if transition.probability else None, text, vae1)
    vae2 = load_vae(models / "vae2", **here)
    dit = load_dit(models / "stage2", **here)
    if dit.config.in_channels != big.dit.in_channels:
        raise WeightsError(
            f"stage2: got {dit.config.in_channels} input channels, want {big.dit.in_channels}: without weights for the "
            "reference a LoRA cannot learn to read it; pass a DiT trained with references"
        )
    settings["models"] = fingerprint(*(models / name for name in ("stage2", "vae1", "vae2")))
    learn = lambda clip, seed: stage2_batch(one, vae2, clip, transition, seed)  # noqa: E731
    batch = latent_pool(photos, clips, samples, train, learn, "sample")
    return LoraTask(Stage2Task(dit, text, batch, config.stage2, **settings), config)


def _stage1(models: Path, here: dict[str, Any]) -> DiT:
    """The one DiT of a first stage that reads no image tokens."""
    dit = load_dit(models / "stage1", **here)
    if dit.config.image_dim or (models / "stage1_low").exists():
        raise WeightsError(
            "stage1: got a DiT that reads CLIP image tokens, or two experts, want one DiT that reads the first frame's "
            "latents alone; pass such a one, or for Stage II --transition 0"
        )
    return dit


def _on_schedule(config: AdaptConfig, profile: Profile) -> AdaptConfig:
    """The configuration with the noise levels at which the profile runs."""
    one, two = profile.stage1, profile.stage2
    levels = [replace(config.stage1.levels, shift=stage.shift, steps=stage.steps) for stage in (one, two)]
    transition = replace(config.stage2.transition, shift=one.shift, steps=one.steps)
    return replace(
        config,
        stage1=replace(config.stage1, levels=levels[0]),
        stage2=replace(config.stage2, levels=levels[1], transition=transition),
    )


def _text(models: Path, embeddings: Path | None, device: str) -> TextEncoder:
    if embeddings is None:
        return load_words(models / "text", device=device)
    tensors = load_file(embeddings)
    if "prompt" not in tensors:
        raise TrainingError(f"{embeddings}: got {sorted(tensors)}, want a tensor `prompt`; see the README")
    return FixedText(tensors["prompt"].float()).to(device)
