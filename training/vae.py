"""Training of the causal video VAE: reconstruction, multi-scale, gradient and a small KL term.

The clip runs as it does at inference, the first frame and then the rest through caches, here in two calls: the size
of a call changes no value.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.errors import SpecError
from ..engine.profile import VAEConfig
from ..engine.vae import VAE
from ..engine.vae_layers import Tape
from .log import TrainingError
from .trainer import step_seed

LOGVAR = (-20.0, 10.0)  # bounds of the log-variance
Batch = Callable[[int, int], Tensor]  # (step, seed) -> video [B, 3, T, H, W] in [-1, 1]


@dataclass(frozen=True)
class VaeLoss:
    """Weights of the terms, each a mean over its elements."""

    pixel: float = 1.0  # L1
    multiscale: float = 0.5  # L1 of averages over 2x2 and 4x4 pixels, each
    gradient: float = 0.5  # L1 of finite differences along x, y and t, each
    kl: float = 1e-4


class VaeTask:
    """Trains all of a VAE on the videos of `batch`; the latents are raw until `finished` measures them."""

    def __init__(
        self, vae: VAE, batch: Batch, weights: VaeLoss | None = None, *, fuse: bool = False, **settings: Any
    ) -> None:
        """`fuse` compiles the step with torch.compile: minutes at the start, a third of the time after."""
        self.vae, self.batch, self.weights = vae, batch, weights or VaeLoss()
        self._terms = torch.compile(self.terms, dynamic=False) if fuse else self.terms
        self.modules: dict[str, nn.Module] = {"vae": vae}
        self.settings = {"kind": "vae", "vae": asdict(vae.config), "loss": asdict(self.weights), **settings}

    def loss(self, step: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of one batch, and its terms."""
        video = self.batch(step, seed).to(self.vae.mean.device)
        config = self.vae.config
        shape = (len(video), config.latent_channels, 1 + (video.shape[2] - 1) // config.time)
        cells = (video.shape[3] // config.spatial, video.shape[4] // config.spatial)
        generator = torch.Generator().manual_seed(step_seed(seed, "posterior"))
        noise = torch.randn(*shape, *cells, generator=generator).to(video.device)  # on the CPU: one for all devices
        total, parts = self._terms(video, noise)
        return total, {name: part.detach() for name, part in parts.items()}

    def terms(self, video: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss and its terms for video [B, 3, T, H, W] and posterior noise [B, z, T', h, w]."""
        mean, logvar = posterior(self.vae, video)
        pixels = reconstruct(self.vae, mean + noise * (0.5 * logvar).exp())
        return vae_loss(pixels, video, mean, logvar, self.weights)


def new_vae(config: VAEConfig, seed: int) -> VAE:
    """A VAE to train from scratch, whose posterior is narrow at first so that the decoder has something to read."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = VAE(config)
    z = config.latent_channels
    with torch.no_grad():
        vae.quant.weight[z:] *= 0.1
        assert vae.quant.bias is not None
        vae.quant.bias[z:] = -6.0
    return vae


def posterior(vae: VAE, video: Tensor) -> tuple[Tensor, Tensor]:
    """video [B, 3, 1 + 4k, H, W] -> fp32 mean and log-variance [B, z, 1 + k, h, w], raw: not normalised."""
    time, space = vae.config.time, vae.config.spatial
    if (video.shape[2] - 1) % time or video.shape[3] % space or video.shape[4] % space:
        raise SpecError(
            f"video: got {tuple(video.shape)}, want {time}k+1 frames and sides that are multiples of {space}; crop it"
        )
    mean, logvar = vae.quant(_two_calls(vae.encoder, video)).float().chunk(2, dim=1)
    return mean, logvar.clamp(*LOGVAR)


def reconstruct(vae: VAE, latents: Tensor) -> Tensor:
    """Raw latents [B, z, 1 + k, h, w] -> fp32 pixels [B, 3, 1 + 4k, H, W], not clipped."""
    return _two_calls(vae.decoder, vae.post_quant(latents)).float()


def vae_loss(
    pixels: Tensor, video: Tensor, mean: Tensor, logvar: Tensor, weights: VaeLoss
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum, and its terms before they are weighted.

    pixels and video [B, 3, T, H, W]; mean and logvar [B, z, T', h, w].
    """
    error = pixels - video
    differences = [error.diff(dim=axis).abs().mean() for axis in (2, 3, 4) if error.shape[axis] > 1]
    parts = {
        "pixel": error.abs().mean(),
        "multiscale": sum((_pool(error, scale).abs().mean() for scale in (2, 4)), error.new_zeros(())),
        "gradient": sum(differences, error.new_zeros(())),
        "kl": 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(),
    }
    total = sum((getattr(weights, name) * part for name, part in parts.items()), error.new_zeros(()))
    return total, parts


@torch.no_grad()
def latent_statistics(vae: VAE, videos: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the raw latents, per channel, over all cells of all videos [B, 3, 1 + 4k, H, W]."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for video in videos:
        cells = posterior(vae, video.to(vae.mean.device))[0].double().transpose(0, 1).flatten(1).cpu()  # -> [z, cells]
        count, total, squares = count + cells.shape[1], total + cells.sum(1), squares + cells.square().sum(1)
    if count < 2:
        raise TrainingError(f"latent statistics: got {count} cells, want 2 or more; pass some videos")
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    if not bool((std > 1e-6).all()):
        raise TrainingError(
            f"latent statistics: got deviations {[round(v, 7) for v in std.tolist()]}, want all above 0; "
            "train longer, or with fewer latent channels"
        )
    return tuple(mean.tolist()), tuple(std.tolist())


def finished(vae: VAE, videos: Iterable[Tensor]) -> VAE:
    """The VAE for use: same weights (copied), with the latent statistics of these videos in its config.

    Linear maps have one deviation for all channels: how much they differ is meant, see `fit_linear`.
    """
    mean, std = latent_statistics(vae, videos)
    if vae.config.linear:
        std = (sqrt(sum(value**2 for value in std) / len(std)),) * len(std)
    copy = VAE(replace(vae.config, mean=mean, std=std)).to(vae.mean.device)
    copy.load_state_dict(vae.state_dict())
    return copy.eval().requires_grad_(False)


def raw(vae: VAE) -> VAE:
    """A finished VAE to train on: same weights (copied), no latent statistics in its config."""
    z = vae.config.latent_channels
    copy = VAE(replace(vae.config, mean=(0.0,) * z, std=(1.0,) * z))
    copy.load_state_dict(vae.state_dict())
    return copy


def _two_calls(run: Callable[[Tensor, Tape], Tensor], x: Tensor) -> Tensor:
    """The first frame or block, then all others in one call; gradients flow through the caches."""
    tape = Tape(None)
    first = run(x[:, :, :1], tape)
    if x.shape[2] == 1:
        return first
    return torch.cat((first, run(x[:, :, 1:], Tape(tape.caches()))), dim=2)


def _pool(x: Tensor, scale: int) -> Tensor:
    """Averages over squares of pixels. [B, C, T, H, W] -> [B, C, T, H/scale, W/scale]."""
    return F.avg_pool3d(x, (1, scale, scale))
