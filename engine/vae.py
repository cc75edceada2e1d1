"""The Wan causal video VAE, both generations, streamed with explicit caches.

A clip of 1 + 4k frames is 1 + k latent blocks. The first call of a stream takes one frame (or block) and gives
caches; every later call takes whole blocks of frames, and caches in a fixed order with fixed shapes.

Axes: B batch, C channels, T frames or blocks of this call, H and W rows and columns.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from .errors import SpecError
from .profile import VAEConfig
from .vae_layers import (
    CausalConv,
    ChannelNorm,
    Down,
    LinearDecoder,
    LinearEncoder,
    Middle,
    ResBlock,
    Tape,
    Up,
    VaeCache,
    average_down,
    count_convs,
    duplicate_up,
    frame_by_frame,
    patchify,
    unpatchify,
)


class EncoderStage(nn.Module):
    """Residual blocks, then down-sampling in all but the last stage."""

    def __init__(self, config: VAEConfig, channels_in: int, channels_out: int, index: int) -> None:
        super().__init__()
        self.last = index == len(config.temporal)
        self.temporal = not self.last and config.temporal[index]
        self.residual = config.residual
        self.channels = channels_out
        widths = [channels_in] + [channels_out] * config.res_blocks
        self.blocks = nn.ModuleList(ResBlock(a, b) for a, b in pairwise(widths))
        self.resample = None if self.last else Down(channels_out, self.temporal)

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        y = x
        for block in self.blocks:
            y = block(y, tape)
        if self.resample is not None:
            y = self.resample(y, tape)
        if not self.residual:
            return y
        return y + average_down(x, self.channels, 2 if self.temporal else 1, 1 if self.last else 2)


class DecoderStage(nn.Module):
    """Residual blocks, then up-sampling in all but the last stage."""

    def __init__(self, config: VAEConfig, channels_in: int, channels_out: int, index: int) -> None:
        super().__init__()
        self.last = index == len(config.temporal)
        self.temporal = not self.last and config.temporal[-1 - index]
        self.residual = config.residual
        self.channels = channels_out
        widths = [channels_in] + [channels_out] * (config.res_blocks + 1)
        self.blocks = nn.ModuleList(ResBlock(a, b) for a, b in pairwise(widths))
        halved = channels_out if config.residual else channels_out // 2
        self.resample = None if self.last else Up(channels_out, halved, self.temporal)

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        y = x
        for block in self.blocks:
            y = block(y, tape)
        if self.resample is None:
            return y
        y = self.resample(y, tape)
        if not self.residual:
            return y
        return y + duplicate_up(x, self.channels, 2 if self.temporal else 1, 2, tape.first)


class Encoder(nn.Module):
    """Pixels [B, 3, T, H, W] to mean and log-variance [B, 2z, T', H/8p, W/8p]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.patch = config.patch
        widths = [config.encoder_dim * m for m in (1, *config.mult)]
        self.conv_in = CausalConv(3 * config.patch**2, widths[0])
        self.stages = nn.ModuleList(EncoderStage(config, a, b, i) for i, (a, b) in enumerate(pairwise(widths)))
        self.middle = Middle(widths[-1])
        self.norm_out = ChannelNorm(widths[-1], 3)
        self.conv_out = CausalConv(widths[-1], 2 * config.latent_channels)
        self.linear = LinearEncoder(config.latent_channels, config.spatial, config.time) if config.linear else None
        # Stages before the first change of frame rate hold the large tensors.
        self.framewise = next((i for i, t in enumerate(config.temporal) if t), len(self.stages))

    def forward(self, pixels: Tensor, tape: Tape) -> Tensor:
        early = self.stages[: self.framewise]
        slots = 1 + count_convs(list(early))

        def run_early(frame: Tensor, tape: Tape) -> Tensor:
            x = self.conv_in(frame, tape)
            for stage in early:
                x = stage(x, tape)
            return x

        area = pixels.shape[3] * pixels.shape[4]
        x = frame_by_frame(run_early, patchify(pixels, self.patch), tape, slots, area)
        for stage in self.stages[self.framewise :]:
            x = stage(x, tape)
        x = self.conv_out.after_norm(self.middle(x, tape), self.norm_out, tape)
        if self.linear is None:
            return x
        mean, spread = x.chunk(2, dim=1)  # 2 x [B, z, T', h, w]
        return torch.cat((mean + self.linear(pixels, tape.first), spread), dim=1)


class Decoder(nn.Module):
    """Latents [B, z, T, h, w] to pixels [B, 3, T', 8ph, 8pw], not yet clipped: training needs their gradients."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.spatial = config.spatial
        widths = [config.decoder_dim * m for m in (config.mult[-1], *reversed(config.mult))]
        self.conv_in = CausalConv(config.latent_channels, widths[0])
        self.middle = Middle(widths[0])
        stages = []
        for index, (a, b) in enumerate(pairwise(widths)):
            halved = index > 0 and not config.residual  # the Wan2.1 up-sampling halves the channels
            stages.append(DecoderStage(config, a // 2 if halved else a, b, index))
        self.stages = nn.ModuleList(stages)
        self.norm_out = ChannelNorm(widths[-1], 3)
        self.conv_out = CausalConv(widths[-1], 3 * config.patch**2)
        self.linear = LinearDecoder(config.latent_channels, config.spatial, config.time) if config.linear else None
        # Stages after the last change of frame rate hold the large tensors.
        changes = [i for i, t in enumerate(reversed(config.temporal)) if t]
        self.framewise = changes[-1] + 1 if changes else 0

    def forward(self, latents: Tensor, tape: Tape) -> Tensor:
        x = self.middle(self.conv_in(latents, tape), tape)
        for stage in self.stages[: self.framewise]:
            x = stage(x, tape)
        late = self.stages[self.framewise :]
        slots = 1 + count_convs(list(late))

        def run_late(frame: Tensor, tape: Tape) -> Tensor:
            y = frame
            for stage in late:
                y = stage(y, tape)
            y = self.conv_out.after_norm(y, self.norm_out, tape)
            return unpatchify(y, self.patch)

        area = latents.shape[3] * latents.shape[4] * self.spatial**2
        pixels = frame_by_frame(run_late, x, tape, slots, area)
        return pixels if self.linear is None else pixels + self.linear(latents, tape.first)


class VAE(nn.Module):
    """A causal video VAE; latents are normalised by the configured per-channel statistics."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder = Encoder(config)
        self.quant = nn.Conv3d(2 * z, 2 * z, 1)
        self.post_quant = nn.Conv3d(z, z, 1)
        self.decoder = Decoder(config)
        self.register_buffer("mean", torch.tensor(config.mean).view(1, z, 1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, z, 1, 1, 1), persistent=False)

    def encode_chunk(self, pixels: Tensor, caches: VaeCache | None, donate: bool = False) -> tuple[Tensor, VaeCache]:
        """One call of an encoding stream.

        pixels [B, 3, 1, H, W] without caches, then [B, 3, 4k, H, W] -> normalised latents [B, z, T', h, w], caches.
        """
        tape = Tape(caches, donate)
        mean = self.quant(self.encoder(pixels, tape)).chunk(2, dim=1)[0]
        return ((mean.float() - self.mean.float()) / self.std.float()).to(mean.dtype), tape.caches()

    def decode_chunk(self, latents: Tensor, caches: VaeCache | None, donate: bool = False) -> tuple[Tensor, VaeCache]:
        """One call of a decoding stream.

        latents [B, z, 1, h, w] without caches, then [B, z, k, h, w] -> pixels [B, 3, 1 or 4k, H, W], caches.
        """
        tape = Tape(caches, donate)
        scaled = (latents.float() * self.std.float() + self.mean.float()).to(latents.dtype)
        return self.decoder(self.post_quant(scaled), tape).clamp(-1, 1), tape.caches()

    def encode(self, video: Tensor) -> Tensor:
        """video [B, 3, T, H, W] in [-1, 1], T = 1 + 4k -> normalised latents [B, z, 1 + k, h, w]."""
        time, space = self.config.time, self.config.spatial
        if (video.shape[2] - 1) % time or video.shape[3] % space or video.shape[4] % space:
            raise SpecError(
                f"video: got {tuple(video.shape)}, want {time}k+1 frames and sides that are multiples of {space}; "
                "cut or pad it first"
            )
        latents, caches = self.encode_chunk(video[:, :, :1], None)
        blocks = [latents]
        for chunk in video[:, :, 1:].split(time, dim=2) if video.shape[2] > 1 else ():
            latents, caches = self.encode_chunk(chunk, caches)
            blocks.append(latents)
        return torch.cat(blocks, dim=2)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, z, T, h, w] -> video [B, 3, 1 + 4(T-1), H, W] in [-1, 1]."""
        pixels, caches = self.decode_chunk(latents[:, :, :1], None)
        chunks = [pixels]
        for block in latents[:, :, 1:].split(1, dim=2) if latents.shape[2] > 1 else ():
            pixels, caches = self.decode_chunk(block, caches)
            chunks.append(pixels)
        return torch.cat(chunks, dim=2)
