"""Principal components of a cell's pixels as the linear maps of a VAE: solved in seconds, and not beaten by training.

Their latents can be turned to resemble those of another VAE, so that DiTs which know that one go on from there.
"""

import hashlib
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.reference import upsample
from ..engine.vae import VAE
from ..engine.vae_layers import to_cells
from .flow import encode_clip
from .log import TrainingError

POSTERIOR = -12.0  # log-variance at first: next to no noise


@torch.no_grad()
def fit_linear(vae: VAE, videos: Iterable[Tensor], like: VAE | None = None) -> None:
    """Set a VAE's linear maps to the principal components of a cell's pixels, its network and posterior to nothing.

    videos [B, 3, 1 + 4k, H, W]. Components differ a hundredfold in size: equal ones would make a DiT learn mostly the
    faintest, and as they are those would drown in its noise, so each gets the root of its deviation. Then they are
    turned, which loses nothing: at random, for channels of like size, or so that the first ones resemble the latents of
    `like`; the first frame's to agree with those of a still clip. `like` may have fewer channels, and cells of more
    pixels: it is shown the clips enlarged. TrainingError for other ones.
    """
    encoder, decoder, z = vae.encoder.linear, vae.decoder.linear, vae.config.latent_channels
    space, time = vae.config.spatial, vae.config.time
    assert encoder is not None
    assert decoder is not None
    if like is not None:
        other = like.config
        if other.latent_channels > z or other.spatial % space or other.time != time:
            raise TrainingError(
                f"VAE to resemble: got {other.latent_channels} channels for "
                f"{other.spatial}x{other.spatial}x{other.time}, want at most {z} for {space}x{space}x{time}, or for "
                "whole multiples of its sides; name such a one"
            )
    first, later = _Moments(), _Moments()
    for video in videos:
        first.add(to_cells(video[:, :, :1], space, 1))
        known = None if like is None else encode_clip(like, _enlarged(video, like.config.spatial // space))[:, :, 1:]
        later.add(to_cells(video[:, :, 1:], space, time), known)
    own, basis = first.rooted(z), later.rooted(z)
    basis = (_random_rotation(z).to(basis) if like is None else _turn(basis @ later.beside)) @ basis
    still = basis.unflatten(1, (time, -1)).sum(1)  # [z, time * pixels] -> [z, pixels]: the latents of a still clip
    own = _turn(own @ first.covariance @ still.T) @ own
    for layer in (vae.encoder.conv_out, vae.decoder.conv_out, vae.quant, vae.post_quant):
        layer.weight.zero_()
        layer.bias.zero_()  # type: ignore[union-attr]
    vae.encoder.conv_out.bias[z:] = POSTERIOR  # type: ignore[index]
    vae.quant.weight.copy_(torch.eye(2 * z).view_as(vae.quant.weight))
    vae.post_quant.weight.copy_(torch.eye(z).view_as(vae.post_quant.weight))
    # A frame alone varies by the root of `time` less than the sum of as many frames that are alike.
    for there, back, rows, moments in (
        (encoder.first, decoder.first, own * time**0.25, first),
        (encoder.next, decoder.next, basis, later),
    ):
        there.weight.copy_(rows[:, :, None, None, None])
        there.bias.copy_(-rows @ moments.mean)  # type: ignore[union-attr]
        back.weight.copy_(torch.linalg.pinv(rows)[:, :, None, None, None])
        back.bias.copy_(moments.mean)  # type: ignore[union-attr]


def freeze_linear(vae: VAE) -> None:
    """Keep the linear maps as they were fitted, and what stands between them and the latents; the network trains."""
    if vae.encoder.linear is not None and vae.decoder.linear is not None:
        for part in (vae.encoder.linear, vae.decoder.linear, vae.quant, vae.post_quant):
            part.requires_grad_(False)


def maps_hash(vae: VAE) -> str:
    """SHA-256 (hex) of the linear maps, for the identity of a training: no checkpoint holds what is not trained."""
    digest = hashlib.sha256()
    for name, value in vae.state_dict().items():
        if ".linear." in name:
            digest.update(f"{name} {tuple(value.shape)}".encode() + value.float().cpu().numpy().tobytes())
    return digest.hexdigest()


class _Moments:
    """Mean and covariance of the pixels of cells, and of other values beside them."""

    def __init__(self) -> None:
        self.count, self.pixels = 0, 0
        self.sum, self.squares = torch.zeros(()), torch.zeros(())

    def add(self, cells: Tensor, beside: Tensor | None = None) -> None:
        """cells [B, pixels, T, H, W] with values [B, n, T, H, W]."""
        together = cells if beside is None else torch.cat((cells, beside), dim=1)
        rows = together.transpose(0, 1).flatten(1).double().cpu()  # [pixels + n, B*T*H*W]
        self.count, self.sum, self.pixels = self.count + rows.shape[1], self.sum + rows.sum(1), cells.shape[1]
        self.squares = self.squares + rows @ rows.T

    @property
    def mean(self) -> Tensor:
        """[pixels]."""
        return self.sum[: self.pixels] / self.count

    @property
    def covariance(self) -> Tensor:
        """[pixels, pixels]."""
        return self._all[: self.pixels, : self.pixels]

    @property
    def beside(self) -> Tensor:
        """Covariance of the pixels with the other values [pixels, n]."""
        return self._all[: self.pixels, self.pixels :]

    @property
    def _all(self) -> Tensor:
        mean = self.sum / self.count
        return self.squares / self.count - torch.outer(mean, mean)

    def rooted(self, count: int) -> Tensor:
        """Rows [count, pixels] for the most variance, each giving a component of the root of its deviation."""
        values, vectors = torch.linalg.eigh(self.covariance)  # rising
        deviation = values[-count:].clamp(min=1e-12).sqrt()
        return (vectors[:, -count:] / deviation.sqrt()).T


def _turn(cross: Tensor) -> Tensor:
    """The rotation [z, z] that brings the first n of z values nearest to others, of covariance [z, n] with those."""
    left, _, right = torch.linalg.svd(F.pad(cross, (0, cross.shape[0] - cross.shape[1])))
    return right.T @ left.T


def _enlarged(video: Tensor, factor: int) -> Tensor:
    """[B, 3, T, H, W] -> [B, 3, T, factor*H, factor*W]."""
    return video if factor == 1 else upsample(video, factor * video.shape[3], factor * video.shape[4])


def _random_rotation(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0))).Q
