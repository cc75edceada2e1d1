"""The same models as diffusers has them, with our weights put in: what its users run, timed beside ours."""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.dit import DiT
from ..engine.errors import EnvironmentMismatch
from ..engine.layouts import dit_name_from_diffusers, is_rotary, vae_config_json, vae_names_in_diffusers
from ..engine.rope import half_split_order
from ..engine.vae import VAE
from .variants import SHORT

UNKNOWN = ("scale_factor_temporal", "scale_factor_spatial", "_class_name")  # follow from the rest


@dataclass(frozen=True)
class Peer:
    """One way to run diffusers' modules."""

    dtype: torch.dtype
    compiled: bool = False

    @property
    def name(self) -> str:
        return f"diffusers_{'compile' if self.compiled else 'eager'}_{SHORT[self.dtype]}"

    def dit(self, ours: DiT, device: torch.device) -> Any:
        model = peer_dit(ours, device, self.dtype)
        return torch.compile(model) if self.compiled else model

    def vae(self, ours: VAE) -> Any:
        """Compiled are the encoder and the decoder, as the loop over chunks around them is Python."""
        model = peer_vae(ours, self.dtype)
        if self.compiled:
            model.encoder, model.decoder = torch.compile(model.encoder), torch.compile(model.decoder)
        return model


def diffusers() -> Any:
    """The package. EnvironmentMismatch where it is missing."""
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise EnvironmentMismatch(
            f"diffusers: got '{error}', want it for --peers; run pip install diffusers, or leave out --peers"
        ) from error


def peer_dit(ours: DiT, device: torch.device, dtype: torch.dtype) -> Any:
    """diffusers' WanTransformer3DModel with the weights of ours, rows of q and k in its order."""
    config = ours.config
    with torch.device("meta"):
        theirs = diffusers().WanTransformer3DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.layers,
            eps=config.eps,
            image_dim=config.image_dim or None,
            added_kv_proj_dim=config.dim if config.image_dim else None,
        )
    state, inverse = ours.state_dict(), half_split_order(config.dim, config.heads).argsort().to(device)
    renamed: dict[str, Tensor] = {}
    for name in theirs.state_dict():
        known = dit_name_from_diffusers(name)
        assert known is not None, name
        tensor = state[known][inverse] if is_rotary(known) else state[known]
        wide = any(part in name for part in theirs._keep_in_fp32_modules)  # as from_pretrained has them
        renamed[name] = tensor.to(torch.float32 if wide else dtype)
    theirs.load_state_dict(renamed, assign=True)
    theirs.rope = type(theirs.rope)(config.head_dim, (1, 2, 2), 1024).to(device)  # its tables are no weights
    return theirs.eval().requires_grad_(False)


def peer_vae(ours: VAE, dtype: torch.dtype) -> Any:
    """diffusers' AutoencoderKLWan with our weights; ours has no linear maps."""
    config = ours.config
    said = {key: value for key, value in vae_config_json(config).items() if key not in UNKNOWN}
    with torch.device("meta"):
        theirs = diffusers().AutoencoderKLWan(**said)
    state = ours.state_dict()
    names = vae_names_in_diffusers(config, state)
    theirs.load_state_dict({names[name]: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return theirs.eval().requires_grad_(False)


class PeerDiT:
    """One forward as diffusers' pipelines do it: text embedding and timesteps inside, a velocity for all tokens."""

    def __init__(self, model: Any, latents: Tensor, timesteps: Tensor, text: Tensor, image: Tensor | None) -> None:
        """latents [1, C, T, H, W]; timesteps [1, T] of the blocks; text [1, L, D]; image tokens [1, n, D]."""
        self.model, self.latents, self.text, self.image = model, latents, text, image
        tokens = (latents.shape[3] // 2) * (latents.shape[4] // 2)
        mixed = bool((timesteps != timesteps[:, :1]).any())
        self.timesteps = timesteps.repeat_interleave(tokens, dim=1) if mixed else timesteps[:, 0]  # [1, L] or [1]

    def __call__(self) -> Tensor:
        with torch.inference_mode():
            return self.model(self.latents, self.timesteps, self.text, self.image, return_dict=False)[0]


class PeerEncoder:
    """A clip to normalised latents, as a pipeline of diffusers does it."""

    def __init__(self, model: Any, ours: VAE, video: Tensor) -> None:
        self.model, self.video = model, video
        self.mean, self.std = ours.mean.to(video), ours.std.to(video)

    def __call__(self) -> Tensor:
        with torch.inference_mode():
            return (self.model.encode(self.video).latent_dist.mode() - self.mean) / self.std


class PeerDecoder:
    """Normalised latents to a clip, as a pipeline of diffusers does it."""

    def __init__(self, model: Any, ours: VAE, latents: Tensor) -> None:
        self.model, self.latents = model, latents
        self.mean, self.std = ours.mean.to(latents), ours.std.to(latents)

    def __call__(self) -> Tensor:
        with torch.inference_mode():
            return self.model.decode(self.latents * self.std + self.mean, return_dict=False)[0]
