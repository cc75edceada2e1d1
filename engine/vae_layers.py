"""Layers of the causal video VAE. Everything a layer remembers between calls passes through a Tape.

Axes: B batch, C channels, T frames of this call, H and W rows and columns.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.attention import attention
from ..kernels.kernel_set import EAGER, KernelSet
from ..kernels.norm import channel_norm
from ..kernels.subpixel import subpixel_weights
from ..kernels.vae_norm import with_history

VaeCache = tuple[Tensor, ...]
TOGETHER = 2**20  # pixels of small frames that run together


class Tape:
    """Causal history of one call: old caches are read, and new ones written, in the order the layers run.

    Without caches the call is the clip's first: history is zero, and layers that change the frame rate skip time.
    With `donate` the new caches take the old ones' memory.
    """

    def __init__(self, caches: VaeCache | None, donate: bool = False) -> None:
        self.first = caches is None
        self.donate = donate
        self._old = iter(caches or ())
        self._new: list[Tensor] = []

    def extend(self, x: Tensor, frames: int) -> Tensor:
        """x [B, C, T, H, W] with the `frames` frames before it -> [B, C, frames+T, H, W]; remembers the last ones."""
        old = self.history()
        extended = with_history(x, old, frames)
        self.remember(extended[:, :, -frames:], old)
        return extended

    def history(self) -> Tensor | None:
        """The next old cache; None in the clip's first call."""
        return None if self.first else next(self._old)

    def remember(self, tail: Tensor, old: Tensor | None = None) -> None:
        """Write one new cache, over the old one where that is donated.

        A copy in any case, because a view would keep the whole extended tensor alive.
        """
        self._new.append(tail.clone() if old is None or not self.donate else old.copy_(tail))

    def forget(self, like: Tensor, frames: int) -> None:
        """Write a zero cache for a layer that the first call skips. like [B, C, T, H, W]."""
        self._new.append(like.new_zeros(*like.shape[:2], frames, *like.shape[3:]))

    def split(self, count: int) -> VaeCache | None:
        """Take the next `count` old caches out, to be run through by another tape."""
        return None if self.first else tuple(next(self._old) for _ in range(count))

    def join(self, caches: VaeCache) -> None:
        """Write the caches another tape came out with."""
        self._new.extend(caches)

    def caches(self) -> VaeCache:
        return tuple(self._new)


class ChannelNorm(nn.Module):
    """Norm over channels; `gamma` has one trailing axis of size 1 for each of the input's axes after C."""

    def __init__(self, channels: int, trailing: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * trailing))

    def forward(self, x: Tensor) -> Tensor:
        return channel_norm(x, self.gamma)


class CausalConv(nn.Conv3d):
    """A 3x3x3 convolution that sees the present and two frames before it."""

    kernels: KernelSet = EAGER

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor, tape: Tape) -> Tensor:  # type: ignore[override]
        return super().forward(tape.extend(x, 2))

    def after_norm(self, x: Tensor, norm: ChannelNorm, tape: Tape) -> Tensor:
        """Norm, SiLU, and this convolution of both. x [B, C, T, H, W] -> [B, C_out, T, H, W]."""
        old = tape.history()
        y, tail = self.kernels.norm_silu_conv(x, norm.gamma, self.weight, self.bias, old)
        tape.remember(tail, old)
        return y


class ResBlock(nn.Module):
    """Two norm-SiLU-convolutions around a shortcut."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(channels_in, 3)
        self.conv1 = CausalConv(channels_in, channels_out)
        self.norm2 = ChannelNorm(channels_out, 3)
        self.conv2 = CausalConv(channels_out, channels_out)
        self.shortcut = nn.Conv3d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        y = self.conv1.after_norm(x, self.norm1, tape)
        y = self.conv2.after_norm(y, self.norm2, tape)
        return y + self.shortcut(x)  # a sum has the layout of its first term: the convolution's


class FrameAttention(nn.Module):
    """One-head attention over the cells of each frame by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        frames = fold_time(x)  # [B, C, T, H, W] -> [B*T, C, H, W]
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)  # [B*T, 3C, H, W] -> [B*T, H*W, 3C]
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)  # each [B*T, 1, H*W, C]
        y = attention(q.contiguous(), k.contiguous(), v.contiguous())
        y = y.squeeze(1).transpose(1, 2).unflatten(2, frames.shape[2:])  # [B*T, 1, H*W, C] -> [B*T, C, H, W]
        return x + unfold_time(self.proj(y), x.shape[0])


class Middle(nn.Module):
    """The bottleneck: residual, attention, residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block1 = ResBlock(channels, channels)
        self.attention = FrameAttention(channels)
        self.block2 = ResBlock(channels, channels)

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        return self.block2(self.attention(self.block1(x, tape)), tape)


class Down(nn.Module):
    """Halves height and width, and with `temporal` the frame rate too (never the clip's first frame)."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        frames = F.pad(fold_time(x), (0, 1, 0, 1))
        x = unfold_time(self.conv(frames), x.shape[0])  # [B, C, T, H/2, W/2]
        if self.time_conv is None:
            return x
        if tape.first:
            tape.remember(x[:, :, -1:])
            return x
        return self.time_conv(tape.extend(x, 1))  # [B, C, 1+T, ...] -> [B, C, T/2, ...]


class Up(nn.Module):
    """Doubles height and width, and with `temporal` the frame rate too (never the clip's first block)."""

    kernels: KernelSet = EAGER
    folded: Tensor | None

    def __init__(self, channels_in: int, channels_out: int, temporal: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.register_buffer("folded", None, persistent=False)
        self.time_conv = nn.Conv3d(channels_in, 2 * channels_in, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        if self.time_conv is not None:
            if tape.first:
                tape.forget(x, 2)
            else:
                pairs = self.time_conv(tape.extend(x, 2)).unflatten(
                    1, (2, -1)
                )  # [B, 2C, T, H, W] -> [B, 2, C, T, H, W]
                x = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)  # -> [B, C, 2T, H, W], even frames first
        frames = self.kernels.upsample_conv(fold_time(x), self.conv.weight, self.conv.bias, self.folded)
        return unfold_time(frames, x.shape[0])

    def fold(self) -> None:
        """Sum the weights for the kernel that runs on the small image, once; plain PyTorch needs no such sums."""
        plain = self.kernels.upsample_conv is EAGER.upsample_conv
        self.folded = None if plain else subpixel_weights(self.conv.weight.detach())


def fold_time(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B*T, C, H, W]."""
    return x.transpose(1, 2).flatten(0, 1)


def unfold_time(x: Tensor, batch: int) -> Tensor:
    """[B*T, C, H, W] -> [B, C, T, H, W]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def average_down(x: Tensor, channels: int, time: int, space: int) -> Tensor:
    """The Wan2.2 encoder's shortcut: cells go to channels, which are averaged in groups.

    [B, C, T, H, W] -> [B, channels, T/time, H/space, W/space]; a single first frame has a zero frame before it.
    """
    missing = -x.shape[2] % time
    x = F.pad(x, (0, 0, 0, 0, missing, 0))
    x = x.unflatten(4, (-1, space)).unflatten(3, (-1, space)).unflatten(2, (-1, time))  # [B, C, T', t, H', s, W', s]
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)  # -> [B, C*t*s*s, T', H', W']
    return x.unflatten(1, (channels, -1)).mean(dim=2)  # -> [B, channels, group, T', H', W'] -> mean over the group


def duplicate_up(x: Tensor, channels: int, time: int, space: int, first: bool) -> Tensor:
    """The Wan2.2 decoder's shortcut: channels, repeated, become cells.

    [B, C, T, H, W] -> [B, channels, T*time, H*space, W*space]; the clip's first block gives a single frame.
    """
    x = x.repeat_interleave(channels * time * space * space // x.shape[1], dim=1)
    x = x.unflatten(1, (channels, time, space, space))  # [B, channels, t, s, s, T, H, W]
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)  # -> [B, channels, T*t, H*s, W*s]
    return x[:, :, time - 1 :] if first else x


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """[B, C, T, H*p, W*p] -> [B, C*p*p, T, H, W]; channel order is (C, column, row)."""
    x = pixels.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # [B, C, T, H, p, W, p]
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """[B, C*p*p, T, H, W] -> [B, C, T, H*p, W*p]; the inverse of patchify."""
    x = x.unflatten(1, (-1, patch, patch))  # [B, C, column, row, T, H, W]
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def to_cells(pixels: Tensor, spatial: int, time: int) -> Tensor:
    """[B, C, T*time, H*spatial, W*spatial] -> [B, time*C*spatial*spatial, T, H, W]: all pixels of a latent cell."""
    x = patchify(pixels, spatial).unflatten(2, (-1, time))  # [B, C*s*s, T, time, H, W]
    return x.permute(0, 3, 1, 2, 4, 5).flatten(1, 2)


def from_cells(x: Tensor, spatial: int, time: int) -> Tensor:
    """[B, time*C*spatial*spatial, T, H, W] -> [B, C, T*time, H*spatial, W*spatial]; the inverse of to_cells."""
    x = x.unflatten(1, (time, -1)).permute(0, 2, 3, 1, 4, 5)  # [B, C*s*s, T, time, H, W]
    return unpatchify(x.flatten(2, 3), spatial)


class LinearEncoder(nn.Module):
    """Pixels to channels of their latent cell, without looking around; the first block is one frame."""

    def __init__(self, channels: int, spatial: int, time: int) -> None:
        super().__init__()
        self.spatial, self.time = spatial, time
        self.first = nn.Conv3d(3 * spatial**2, channels, 1)
        self.next = nn.Conv3d(3 * spatial**2 * time, channels, 1)

    def forward(self, pixels: Tensor, first: bool) -> Tensor:
        time, layer = (1, self.first) if first else (self.time, self.next)
        return layer(to_cells(pixels, self.spatial, time))


class LinearDecoder(nn.Module):
    """The way back: channels of a latent cell to its pixels."""

    def __init__(self, channels: int, spatial: int, time: int) -> None:
        super().__init__()
        self.spatial, self.time = spatial, time
        self.first = nn.Conv3d(channels, 3 * spatial**2, 1)
        self.next = nn.Conv3d(channels, 3 * spatial**2 * time, 1)

    def forward(self, latents: Tensor, first: bool) -> Tensor:
        time, layer = (1, self.first) if first else (self.time, self.next)
        return from_cells(layer(latents), self.spatial, time)


def frame_by_frame(run: Callable[[Tensor, Tape], Tensor], x: Tensor, tape: Tape, slots: int, pixels: int) -> Tensor:
    """Run layers that keep the frame rate a few frames at a time: the same values, and memory for those alone.

    `slots` is how many caches `run` uses. `pixels` is the size of a full frame: large ones go one by one, while small
    ones go together, because many small calls are slower.
    """
    caches, outputs = tape.split(slots), []
    for frames in x.split(max(1, TOGETHER // pixels), dim=2):
        inner = Tape(caches, tape.donate)
        outputs.append(run(frames, inner))
        caches = inner.caches()
    tape.join(caches or ())
    return torch.cat(outputs, dim=2)


def count_convs(modules: Sequence[nn.Module]) -> int:
    """How many caches these modules use: one for each causal convolution."""
    return sum(isinstance(layer, CausalConv) for module in modules for layer in module.modules())
