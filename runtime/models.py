"""From files to modules: where the weights of a profile are, and opening them.

A model folder holds `stage1`, `stage2`, `vae1`, `vae2`, `text` (and `stage1_low`, `image_encoder` where the models
have them), each a file or folder in any layout that engine/weights.py reads. Single paths override its entries.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.dit import DiT
from ..engine.errors import WeightsError
from ..engine.presets import A14B_BOUNDARY
from ..engine.profile import Profile
from ..engine.text import WordEncoder
from ..engine.vae import VAE
from ..engine.weights import fingerprint, load_dit, load_vae, load_words
from .conditioning import CachedEncoder, EmbeddingCache, PromptEncoder, load_embeddings
from .devices import best_dtype
from .encoders import ClipVisionEncoder, Umt5Encoder, umt5_fingerprint
from .prompts import GivenPrompts, WordPrompts

SHIPPED = Path(__file__).resolve().parent.parent / "weights"
# Subfolders under which public repositories keep the two experts of one model: (high noise, low noise).
EXPERT_FOLDERS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))
Lora = tuple[Path, float]  # file and strength


@dataclass(frozen=True)
class ModelPaths:
    """Files or folders of a profile's models; all None means untrained weights from a seed."""

    stage1: Path | None = None
    stage1_low: Path | None = None  # the second expert of a Wan2.2-I2V-A14B
    stage2: Path | None = None
    vae1: Path | None = None
    vae2: Path | None = None
    text: Path | None = None
    image_encoder: Path | None = None
    loras: dict[str, tuple[Lora, ...]] = field(default_factory=dict)  # by stage1, stage1_low, stage2

    @property
    def given(self) -> dict[str, Path]:
        """The paths that are set, by name."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "loras"}
        return {name: path for name, path in values.items() if path is not None}


def find_models(profile: Profile, folder: Path | None, single: ModelPaths) -> ModelPaths:
    """Resolve a model folder and single paths; with neither, the weights shipped for the profile, if there are any."""
    if folder is None and not single.given and (SHIPPED / profile.name).is_dir():
        folder = SHIPPED / profile.name
    if folder is None and not single.given:
        return single
    found = {name: path for name in ModelPaths().__dataclass_fields__ if (path := _entry(folder, name)) is not None}
    paths = ModelPaths(**{**found, **single.given}, loras=single.loras)
    paths = _split_experts(paths)
    for name, path in paths.given.items():
        if not path.exists():
            raise WeightsError(f"{name}: got {path}, want a file or folder that exists; check the path")
    missing = [name for name in ("stage1", "stage2", "vae1", "vae2") if getattr(paths, name) is None]
    if missing:
        raise WeightsError(
            f"models of {profile.name}: got no {', '.join(missing)}, want all of stage1, stage2, vae1, vae2; "
            "pass --model-dir with those entries, or each by its option"
        )
    return paths


def _entry(folder: Path | None, name: str) -> Path | None:
    """The entry of a model folder: NAME/ or NAME.safetensors."""
    if folder is None or name == "loras":
        return None
    if not folder.is_dir():
        raise WeightsError(f"model folder: got {folder}, want a folder; check the path")
    return next((p for p in (folder / name, folder / f"{name}.safetensors") if p.exists()), None)


def _split_experts(paths: ModelPaths) -> ModelPaths:
    """A stage1 folder that holds two experts is taken as both."""
    if paths.stage1 is None or paths.stage1_low is not None:
        return paths
    for high, low in EXPERT_FOLDERS:
        if (paths.stage1 / high).is_dir() and (paths.stage1 / low).is_dir():
            return replace(paths, stage1=paths.stage1 / high, stage1_low=paths.stage1 / low)
    return paths


@dataclass(frozen=True)
class Loaded:
    """Open models, and the profile with the sizes they have."""

    profile: Profile
    modules: dict[str, nn.Module]
    prompts: PromptEncoder
    device: torch.device
    dtype: torch.dtype
    image_encoder: Callable[[np.ndarray], Tensor] | None = None
    trained: bool = True


def load_models(
    profile: Profile,
    paths: ModelPaths | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    cache: Path | None = None,
    embeddings: Path | None = None,
) -> Loaded:
    """Open everything a session needs. dtype None is the best the device computes in.

    `paths` None are the weights shipped for the profile; where there are none, small profiles get untrained ones from a
    fixed seed. `cache` is the folder where prompt embeddings are kept, `embeddings` a file of ready ones.
    """
    device = torch.device(device)
    dtype = dtype or best_dtype(device)
    paths = find_models(profile, None, ModelPaths()) if paths is None else paths
    if not paths.given:
        return untrained_models(profile, dtype, device)
    profile, modules = load_modules(profile, paths, dtype, device)
    dit = profile.stage1.dit
    if (dit.text_dim, dit.text_len) != (profile.stage2.dit.text_dim, profile.stage2.dit.text_len):
        raise WeightsError(
            f"Stage I reads text of {dit.text_len}x{dit.text_dim}, Stage II of {profile.stage2.dit.text_len}x"
            f"{profile.stage2.dit.text_dim}: want the same; use DiTs made for one text encoder"
        )
    if embeddings is not None:
        ready = load_embeddings(embeddings, dit.text_dim, dit.text_len)
        prompts: PromptEncoder = GivenPrompts(ready, fingerprint(embeddings))
        if ready.image is not None:
            image = ready.image
            return Loaded(profile, modules, prompts, device, dtype, lambda _: image)
    else:
        prompts = _prompt_encoder(profile, paths, dtype, device, cache)
    return Loaded(profile, modules, prompts, device, dtype, _image_encoder(profile, paths, device))


def load_modules(
    profile: Profile, paths: ModelPaths, dtype: torch.dtype, device: torch.device
) -> tuple[Profile, dict[str, nn.Module]]:
    """The modules by graph weights name, and the profile with the sizes these checkpoints have."""

    def dit(name: str, path: Path) -> DiT:
        return load_dit(path, dtype=dtype, device=device, loras=paths.loras.get(name, ()))

    vae1 = load_vae(_needed(paths.vae1), dtype=dtype, device=device)
    vae2 = load_vae(_needed(paths.vae2), dtype=dtype, device=device)
    stage1, stage2 = dit("stage1", _needed(paths.stage1)), dit("stage2", _needed(paths.stage2))
    modules: dict[str, nn.Module] = {"vae1": vae1, "vae2": vae2, "stage1": stage1, "stage2": stage2}
    boundary = None
    if paths.stage1_low is not None:
        boundary = A14B_BOUNDARY
        low = dit("stage1_low", paths.stage1_low)
        if low.config != stage1.config:
            raise WeightsError(f"stage1_low: got {low.config}, want {stage1.config}; pass the two experts of one model")
        modules |= {"stage1_high": modules.pop("stage1"), "stage1_low": low}
    profile = replace(
        profile,
        stage1=replace(profile.stage1, dit=stage1.config, vae=vae1.config, boundary=boundary),
        stage2=replace(profile.stage2, dit=stage2.config, vae=vae2.config),
    )
    return profile, modules


def _needed(path: Path | None) -> Path:
    if path is None:
        raise WeightsError("models: got a missing path, want stage1, stage2, vae1 and vae2; use find_models")
    return path


def untrained_models(profile: Profile, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Loaded:
    """Random models of the profile's sizes, the same every time; refused for profiles of real size."""
    if profile.text.kind != "words":
        raise WeightsError(
            f"models of {profile.name}: got none, want checkpoints of that size; pass --model-dir, see README"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules: dict[str, nn.Module] = {
            "stage1": DiT(profile.stage1.dit),
            "stage2": DiT(profile.stage2.dit),
            "vae1": VAE(profile.stage1.vae),
            "vae2": VAE(profile.stage2.vae),
        }
        words = _words(profile)
    for module in (*modules.values(), words):
        module.requires_grad_(False).to(device)
    for module in modules.values():
        for parameter in module.parameters():  # buffers stay fp32
            parameter.data = parameter.data.to(dtype)
    return Loaded(profile, modules, WordPrompts(words, f"untrained-{seed}"), device, dtype, trained=False)


def _words(profile: Profile) -> WordEncoder:
    dit = profile.stage1.dit
    return WordEncoder(profile.text.vocabulary, dit.text_dim, dit.text_len)


def _prompt_encoder(
    profile: Profile, paths: ModelPaths, dtype: torch.dtype, device: torch.device, cache: Path | None
) -> PromptEncoder:
    if paths.text is None:
        raise WeightsError(
            f"text encoder of {profile.name}: got none, want its folder or ready embeddings; "
            "pass --text or --embeddings"
        )
    path, text_len = paths.text, profile.stage1.dit.text_len
    if profile.text.kind == "words":
        return WordPrompts(load_words(path, device=device), fingerprint(path))
    wide = dtype if dtype == torch.float32 else torch.bfloat16  # UMT5 overflows in fp16
    if cache is None:
        return Umt5Encoder.open(path, device, wide, text_len)
    return CachedEncoder(
        lambda: Umt5Encoder.open(path, device, wide, text_len),
        umt5_fingerprint(path, wide, text_len),
        EmbeddingCache(cache / "embeddings"),
    )


def _image_encoder(profile: Profile, paths: ModelPaths, device: torch.device) -> Callable[[np.ndarray], Tensor] | None:
    """CLIP features of a frame; the encoder is opened for the call and freed after it."""
    path = paths.image_encoder
    if path is None or not profile.stage1.dit.image_dim:
        return None
    return lambda frame: ClipVisionEncoder.open(path, device).encode(torch.from_numpy(frame))
