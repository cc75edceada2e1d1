"""The models that are timed: trained ones where there are some, else random ones of the real size, and named so."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..engine.dit import DiT
from ..engine.graphs import new_module
from ..engine.layouts import stays_fp32
from ..engine.profile import Profile, VAEConfig
from ..engine.vae import VAE
from ..runtime.backend_weights import weights_record
from ..runtime.conditioning import Embeddings, PromptEncoder
from ..runtime.model_paths import ModelPaths, find_models, fit_profile
from ..runtime.models import ImageEncoder, load_encoders, load_modules, untrained_models
from ..runtime.prompts import GivenPrompts

SEED = 0


@dataclass
class Models:
    """Where modules come from, by dtype. `weights` says which: SHA-256 (hex) by name, or random."""

    profile: Profile
    paths: ModelPaths
    device: torch.device
    weights: dict[str, str]
    prompts: PromptEncoder
    image_encoder: ImageEncoder | None = None
    _opened: dict[tuple[str, torch.dtype], nn.Module] = field(default_factory=dict, repr=False)

    def module(self, name: str, dtype: torch.dtype) -> nn.Module:
        """The module of that weights name; every dtype has the same values, rounded."""
        if (name, dtype) not in self._opened:
            for other, module in self._make(name, dtype).items():
                self._opened[other, dtype] = module
        return self._opened[name, dtype]

    def forget(self) -> None:
        """Drop every module, so that what runs next has the memory."""
        self._opened.clear()

    def _make(self, name: str, dtype: torch.dtype) -> dict[str, nn.Module]:
        if self.paths.trained:
            return load_modules(self.paths, self.device, dtype)
        if self.profile.text.kind == "words":
            return untrained_models(self.profile, dtype, self.device).modules
        return {name: random_module(self.profile, name, dtype, self.device)}


def open_models(profile: Profile, model_dir: Path | None, device: torch.device) -> Models:
    """Models of a profile; no weights are read yet, beyond the small encoder of `nano`.

    Large models without files get random weights and random embeddings: the time does not depend on the values.
    """
    paths = find_models(profile, model_dir)
    if paths.trained:
        profile = fit_profile(profile, paths)
        prompts, image_encoder = load_encoders(profile, paths, device, torch.float32, None)
        return Models(profile, paths, device, weights_record(profile, paths).sha256, prompts, image_encoder)
    random = {"all": f"random, seed {SEED}"}
    if profile.text.kind == "words":
        return Models(profile, paths, device, random, untrained_models(profile, torch.float32, device).prompts)
    dit = profile.stage1.dit
    text, negative = (_normal((1, dit.text_len, dit.text_dim), seed) for seed in (1, 2))
    image = _normal((1, dit.image_tokens, dit.image_dim), 3) if dit.image_dim else None
    prompts = GivenPrompts(Embeddings(text, negative, image), "random")
    return Models(profile, paths, device, random, prompts, None if image is None else lambda _: image)


def random_module(profile: Profile, name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A module whose parameters keep activations near one, made on its device: 16 billion of them fit no host twice."""
    generator = torch.Generator(device).manual_seed(SEED + sum(map(ord, name)))
    with torch.device("meta"):
        module = new_module(profile, name)
    state: dict[str, Tensor] = {}
    for key, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, device=device, generator=generator)
        if parameter.ndim > 1 and not key.endswith(("modulation", "gamma")):
            noise /= parameter[0].numel() ** 0.5
        elif key.endswith(("gamma", "norm_q.weight", "norm_k.weight", "norm_k_img.weight", "norm3.weight")):
            noise = 1 + 0.1 * noise
        else:
            noise *= 0.1
        wide = isinstance(module, DiT) and stays_fp32(key)  # as a loaded checkpoint has it
        state[key] = noise if wide else noise.to(dtype)
    module.load_state_dict(state, assign=True)
    if isinstance(module, VAE):
        module.mean, module.std = _statistics(module.config, device)
    return module.eval().requires_grad_(False)


def _statistics(config: VAEConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = (1, config.latent_channels, 1, 1, 1)
    mean, std = (torch.tensor(values, device=device).view(shape) for values in (config.mean, config.std))
    return mean, std


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
