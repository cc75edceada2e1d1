"""LoRA training of either stage of any profile on clips drawn over photographs: how a Wan-sized model is adapted."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ..engine.errors import WeightsError
from ..engine.presets import A14B_BOUNDARY
from ..engine.profile import Profile
from ..engine.weights import fingerprint, load_words
from .batches import Crops, Samples, latent_pool, photos_hash
from .clips import ClipConfig, low_factor
from .drawing import Drawer
from .flow import Expert, ExpertLevels
from .log import TrainingError
from .lora import TARGETS, Lora, checkpoint_blocks
from .model_folder import Merged, ModelFolder
from .stage1 import FixedText, ImageEncoder, Stage1Config, Stage1Task, TextEncoder, stage1_batch
from .stage2 import Stage2Config, Stage2Task, stage2_batch
from .textures import TEXTURE_WIDTH
from .trainer import Parts, TrainConfig, step_seed
from .transition import StageOne, TransitionConfig

Stage = Literal["stage1", "stage2"]
OpenImages = Callable[[Path], ImageEncoder]  # opens the CLIP tower in a folder


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
    expert: Expert | None = None  # of a Stage I that has two
    merged: Merged = field(default_factory=dict)  # LoRAs that the models already have, such as few-step ones
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

    def loss(self, step: int, seed: int) -> tuple[Tensor, Parts]:
        """The stage's own loss."""
        return self.task.loss(step, seed)


def adapt_task(
    profile: Profile, stage: Stage, models: Path, photos: Sequence[np.ndarray], config: AdaptConfig,
    embeddings: Path | None = None, open_images: OpenImages | None = None,
) -> LoraTask:  # fmt: skip
    """The task of a LoRA for `stage`, on the models in the folder `models`.

    The text encoder is models/text, or the tensor `prompt` of the file `embeddings` for every clip. Stage II needs
    Stage I only where its transition has a probability. Where Stage I reads CLIP image tokens, `open_images` opens
    models/image_encoder. WeightsError for models that are missing or do not fit.
    """
    train = config.train
    config = _on_schedule(config, profile)
    folder = ModelFolder(models, torch.bfloat16 if train.bf16 else torch.float32, train.device, config.merged)
    big, small = profile.stage2, profile.stage1
    if embeddings is None and profile.text.kind != "words":
        raise TrainingError(f"text of {profile.name}: got no embeddings, want rows of UMT5; pass --embeddings")
    text = _text(models, embeddings, train.device, (small.dit.text_len, small.dit.text_dim))
    photos = large_enough(photos, profile)
    # Textures are of a size of their own; what is larger gets none, rather than one without fine detail.
    procedural = ClipConfig.procedural if big.width <= TEXTURE_WIDTH else 0.0
    clips = ClipConfig(big.width, big.height, profile.frames, low_factor(profile), procedural)
    crops = config.crops or Crops(train.batch, big.width, big.height)
    samples, drawer = Samples(crops, config.window, config.reuse), Drawer(photos, device=train.device)
    settings: dict[str, Any] = {"profile": profile.name, "crops": asdict(crops), "reuse": config.reuse}
    settings |= {"clips": asdict(clips), "photos": photos_hash(photos)}
    settings["text"] = fingerprint(embeddings or models / "text")
    boundary = small.boundary or A14B_BOUNDARY
    if stage == "stage1":
        entry = folder.expert(config.expert)
        images = _images(folder, (entry,), open_images, settings)
        settings |= folder.identity(entry, "vae1")
        vae1, dit, learned = folder.vae("vae1"), folder.dit(entry), config.stage1
        if config.expert is not None:
            levels = ExpertLevels(**asdict(learned.levels), boundary=boundary, expert=config.expert)
            learned = replace(learned, levels=levels)
        learn = lambda clip, _: stage1_batch(vae1, clip, images)  # noqa: E731
        batch = latent_pool(drawer, clips, samples, train, learn, "cpu", "sample")
        return _adapted(Stage1Task(dit, text, batch, learned, **settings), config)
    transition = config.stage2.transition
    entries = _transition_entries(folder, transition, boundary)
    channels = folder.config("stage2").in_channels
    if channels != big.dit.in_channels:
        raise WeightsError(
            f"stage2: got {channels} input channels, want {big.dit.in_channels}: without weights for the "
            "reference a LoRA cannot learn to read it; pass a DiT trained with references"
        )
    images = _images(folder, entries, open_images, settings)
    settings |= folder.identity(*entries, "stage2", "vae1", "vae2")
    dits = {entry: folder.dit(entry) for entry in entries}
    limit = boundary if "stage1_low" in dits else 0.0
    one = StageOne(dits.get("stage1"), text, folder.vae("vae1"), dits.get("stage1_low"), limit, images)
    vae2, dit = folder.vae("vae2"), folder.dit("stage2")
    learn = lambda clip, seed: stage2_batch(one, vae2, clip, transition, seed)  # noqa: E731
    batch = latent_pool(drawer, clips, samples, train, learn, "cpu", "sample")
    return _adapted(Stage2Task(dit, text, batch, config.stage2, **settings), config)


def large_enough(photos: Sequence[np.ndarray], profile: Profile) -> list[np.ndarray]:
    """The photographs with a pixel and more for every pixel of the profile's clips: others would teach it to blur.

    TrainingError where none is left.
    """
    width, height = profile.width, profile.height
    kept = [photo for photo in photos if photo.shape[0] >= height and photo.shape[1] >= width]
    if not kept:
        got = max((photo.shape[1::-1] for photo in photos), default=(0, 0))
        raise TrainingError(
            f"photographs: got up to {got[0]}x{got[1]}, want {width}x{height} and more for {profile.name}; "
            "pass a --photos-dir with large ones, not --packed"
        )
    return kept


def _adapted(task: Stage1Task | Stage2Task, config: AdaptConfig) -> LoraTask:
    torch.manual_seed(step_seed(config.train.seed, "lora"))
    return LoraTask(task, config)


def _transition_entries(folder: ModelFolder, transition: TransitionConfig, boundary: float) -> tuple[str, ...]:
    """The DiTs of Stage I that transition runs: none, the one, or of two experts those that its noise levels reach."""
    if not transition.probability:
        return ()
    if folder.find("stage1_low") is None:
        return ("stage1",)
    return ("stage1", "stage1_low") if transition.highest >= boundary else ("stage1_low",)


def _images(
    folder: ModelFolder, entries: Sequence[str], open_images: OpenImages | None, settings: dict[str, Any]
) -> ImageEncoder | None:
    """The image encoder where one of the DiTs reads its tokens; what it is goes into the settings."""
    if not any(folder.config(entry).image_dim for entry in entries):
        return None
    if open_images is None:
        raise TrainingError("stage1: got no image encoder, want one, as it reads CLIP image tokens; pass open_images")
    images = open_images(folder.path("image_encoder"))
    settings["image_encoder"] = images.fingerprint
    return images


def _on_schedule(config: AdaptConfig, profile: Profile) -> AdaptConfig:
    """The configuration with the noise levels at which the profile runs."""
    one, two = profile.stage1, profile.stage2
    return replace(
        config,
        stage1=replace(config.stage1, levels=config.stage1.levels.at(one)),
        stage2=replace(config.stage2, levels=config.stage2.levels.at(two), transition=config.stage2.transition.at(one)),
    )


def _text(models: Path, embeddings: Path | None, device: str, shape: tuple[int, int]) -> TextEncoder:
    """The word encoder, or ready rows [L, D] or [1, L, D], zero past their end as at inference."""
    if embeddings is None:
        return load_words(models / "text", device=device)
    tensors = load_file(embeddings)
    if "prompt" not in tensors:
        raise TrainingError(f"{embeddings}: got {sorted(tensors)}, want a tensor `prompt`; see docs/TRAINING.md")
    rows, (length, width) = tensors["prompt"].float(), shape
    rows = rows.unsqueeze(0) if rows.ndim == 2 else rows  # [L, D] -> [1, L, D]
    if rows.ndim != 3 or rows.shape[0] != 1 or rows.shape[1] > length or rows.shape[2] != width:
        raise TrainingError(
            f"{embeddings}: got `prompt` {tuple(rows.shape)}, want (1, 1 to {length}, {width}); redo it"
        )
    return FixedText(F.pad(rows, (0, 0, 0, length - rows.shape[1]))).to(device)
