"""From paths to modules and encoders."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.dit import DiT
from ..engine.manifest import Bundle
from ..engine.profile import Profile
from ..engine.text import WordEncoder
from ..engine.vae import VAE
from ..engine.weights import fingerprint, load_dit, load_vae, load_words
from .acceleration import Acceleration
from .conditioning import CachedEncoder, EmbeddingCache, PromptEncoder, load_embeddings
from .devices import best_dtype
from .encoders import ClipVisionEncoder, Umt5Encoder, umt5_fingerprint
from .model_paths import ModelPaths, find_models, fit_profile, path_of
from .prompts import GivenPrompts, WordPrompts

ImageEncoder = Callable[[np.ndarray], Tensor]


@dataclass(frozen=True)
class Loaded:
    """Open models, and the profile with the sizes they have."""

    profile: Profile
    modules: dict[str, nn.Module]  # by the weights name of the graphs; none where a bundle has them compiled
    prompts: PromptEncoder
    device: torch.device
    dtype: torch.dtype
    image_encoder: ImageEncoder | None = None
    trained: bool = True
    bundle: Bundle | None = None  # what runs in place of the modules
    acceleration: Acceleration = field(default_factory=Acceleration)  # as fused.accelerate sets it

    @property
    def backend(self) -> str:
        """What runs the graphs, with all that decides the bits of the frames; for records."""
        name = "eager" if self.bundle is None else self.bundle.manifest.backend
        return ", ".join(filter(None, (name, self.acceleration.words)))


def load_models(
    profile: Profile,
    paths: ModelPaths | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    cache: Path | None = None,
) -> Loaded:
    """Open everything a session needs. dtype None is the best the device computes in.

    `paths` None are the weights shipped for the profile; where there are none, small profiles get untrained ones from a
    fixed seed. `cache` is a folder where prompt embeddings are kept from run to run.
    """
    device = torch.device(device)
    dtype = dtype or best_dtype(device)
    paths = find_models(profile) if paths is None else paths
    profile = fit_profile(profile, paths)
    if not paths.trained:
        return untrained_models(profile, dtype, device)
    prompts, image_encoder = load_encoders(profile, paths, device, dtype, cache)
    return Loaded(profile, load_modules(paths, device, dtype), prompts, device, dtype, image_encoder)


def load_modules(paths: ModelPaths, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The modules of checkpoints, by the weights name of the graphs."""
    modules: dict[str, nn.Module] = {}
    for name, entry in weight_entries(paths).items():
        path, loras = path_of(paths, entry), paths.loras.get(entry, ())
        if name.startswith("vae"):
            modules[name] = load_vae(path, dtype=dtype, device=device)
        else:
            modules[name] = load_dit(path, dtype=dtype, device=device, loras=loras)
    return modules


def weight_entries(paths: ModelPaths) -> dict[str, str]:
    """Which entry of the paths each weights name of the graphs comes from."""
    experts = {"stage1_high": "stage1", "stage1_low": "stage1_low"} if paths.stage1_low else {"stage1": "stage1"}
    return {**experts, "stage2": "stage2", "vae1": "vae1", "vae2": "vae2"}


def load_encoders(
    profile: Profile, paths: ModelPaths, device: torch.device, dtype: torch.dtype, cache: Path | None
) -> tuple[PromptEncoder, ImageEncoder | None]:
    """The encoders of prompts and, where Stage I reads it, of the image; large ones open when called, and close."""
    dit = profile.stage1.dit
    image_path = paths.image_encoder
    image_encoder = None
    if dit.image_dim and image_path is not None:
        image_encoder = lambda frame: ClipVisionEncoder.open(image_path, device).encode(torch.from_numpy(frame))  # noqa: E731
    if paths.embeddings is not None:
        ready = load_embeddings(paths.embeddings, dit.text_dim, dit.text_len)
        if ready.image is not None:
            image = ready.image
            image_encoder = lambda _: image  # noqa: E731
        return GivenPrompts(ready, fingerprint(paths.embeddings)), image_encoder
    path, text_len = path_of(paths, "text"), dit.text_len
    if profile.text.kind == "words":
        return WordPrompts(load_words(path, device=device), fingerprint(path)), image_encoder
    wide = dtype if dtype == torch.float32 else torch.bfloat16  # UMT5 overflows in fp16
    prompts = CachedEncoder(
        lambda: Umt5Encoder.open(path, device, wide, text_len),
        umt5_fingerprint(path, wide, text_len),
        None if cache is None else EmbeddingCache(cache / "embeddings"),
    )
    return prompts, image_encoder


def untrained_models(profile: Profile, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Loaded:
    """Random models of the profile's sizes, the same every time."""
    dit = profile.stage1.dit
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        modules: dict[str, nn.Module] = {
            "stage1": DiT(profile.stage1.dit),
            "stage2": DiT(profile.stage2.dit),
            "vae1": VAE(profile.stage1.vae),
            "vae2": VAE(profile.stage2.vae),
        }
        words = WordEncoder(profile.text.vocabulary, dit.text_dim, dit.text_len)
    for module in (*modules.values(), words):
        module.requires_grad_(False).to(device)
    for module in modules.values():
        for parameter in module.parameters():  # buffers stay fp32
            parameter.data = parameter.data.to(dtype)
    return Loaded(profile, modules, WordPrompts(words, f"untrained-{seed}"), device, dtype, trained=False)
