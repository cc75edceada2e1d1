"""The Wan-family diffusion transformer, in the form that compiles: tables in, no timesteps and no positions inside.

One class serves Wan2.1-I2V-14B, Wan2.2-I2V-A14B, Wan2.2-TI2V-5B and SwiftI2V's Stage II. Parameter names are those of
the original Wan checkpoints. The rows of the self-attention's q and k (and of their norms) are in half-split order,
see engine/rope.py; engine/weights.py permutes on load and undoes it on save.

Axes: B batch, T latent blocks, S tokens of a block, L = T*S, D width, R modulation rows, N layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.attention import attention
from ..kernels.kernel_set import EAGER, KernelSet
from ..kernels.norm import rms_norm
from .profile import DiTConfig
from .rope import rope_tables


@dataclass(frozen=True)
class TextKV:
    """Keys and values of the prompt (and image tokens) for every layer: [N, B, heads, tokens, D/heads]."""

    k: Tensor
    v: Tensor
    image_k: Tensor | None = None
    image_v: Tensor | None = None

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        if self.image_k is None or self.image_v is None:
            return self.k[index], self.v[index], None, None
        return self.k[index], self.v[index], self.image_k[index], self.image_v[index]


@dataclass(frozen=True)
class ContextKV:
    """Keys and values that a window's first tokens had in an earlier step, for every layer: as TextKV."""

    k: Tensor
    v: Tensor

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return self.k[index], self.v[index]


KeysValues = tuple[Tensor, Tensor]  # of one layer: [B, heads, tokens, D/heads] each


class RMSNorm(nn.Module):
    """Root-mean-square norm over the whole width, all heads together."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """The projections that self- and cross-attention share."""

    kernels: KernelSet = EAGER

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, config.eps)
        self.norm_k = RMSNorm(dim, config.eps)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, L, D] -> [B, heads, L, D/heads]

    def normed(self, x: Tensor, norm: RMSNorm, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        """Norm, heads apart, rotation where there are tables. x [B, L, D] -> [B, heads, L, D/heads]."""
        return self.kernels.norm_rope(x, norm.weight, cos, sin, self.heads, norm.eps)


class SelfAttention(Attention):
    """Attention within the window, in both directions unless a mask says otherwise."""

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        queries: int,
        context: KeysValues | None = None,
        made: list[KeysValues] | None = None,
    ) -> Tensor:
        """x [B, L, D], the last `queries` tokens ask -> [B, queries, D].

        `context` are keys and values of C tokens before these, which are not in x; a mask is [queries, C+L] then. Keys
        and values of x are added to `made`.
        """
        q = self.normed(self.q(x[:, -queries:]), self.norm_q, cos[-queries:], sin[-queries:])
        k = self.normed(self.k(x), self.norm_k, cos, sin)
        v = self.split(self.v(x))
        if made is not None:
            made.append((k, v))
        if mask is None:
            y = self.kernels.attend(q, k, v, *(context or ()))
        else:  # for comparisons; only PyTorch's own attention takes one
            if context is not None:
                k, v = torch.cat((context[0], k), dim=2), torch.cat((context[1], v), dim=2)  # [B, heads, C+L, D/heads]
            y = attention(q, k, v, mask).transpose(1, 2)
        return self.o(y.flatten(2))  # [B, queries, heads, D/heads] -> [B, queries, D]


class CrossAttention(Attention):
    """Attention to the prompt, and to image tokens where the model has them; keys and values come ready."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        if config.image_dim:
            self.k_img = nn.Linear(config.dim, config.dim)
            self.v_img = nn.Linear(config.dim, config.dim)
            self.norm_k_img = RMSNorm(config.dim, config.eps)

    def text_kv(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """text [B, tokens, D] -> keys and values [B, heads, tokens, D/heads]."""
        return self.normed(self.k(text), self.norm_k), self.split(self.v(text))

    def image_kv(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image [B, tokens, D] -> keys and values [B, heads, tokens, D/heads]."""
        return self.normed(self.k_img(image), self.norm_k_img), self.split(self.v_img(image))

    def forward(self, x: Tensor, k: Tensor, v: Tensor, image_k: Tensor | None, image_v: Tensor | None) -> Tensor:
        q = self.normed(self.q(x), self.norm_q)
        y = self.kernels.attend(q, k, v)  # [B, L, heads, D/heads]
        if image_k is not None and image_v is not None:
            y = y + self.kernels.attend(q, image_k, image_v)
        return self.o(y.flatten(2))  # -> [B, L, D]


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward; `keep` blocks at the window's end leave it."""

    kernels: KernelSet = EAGER

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, config.dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def forward(
        self,
        x: Tensor,
        rows: Tensor,
        rope: tuple[Tensor, Tensor],
        kv: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        mask: Tensor | None,
        keep: int,
        context: KeysValues | None = None,
        made: list[KeysValues] | None = None,
    ) -> Tensor:
        """x [B, T, S, D], rows [B, T, 6, D] -> [B, keep, S, D]; context and made as self-attention has them."""
        tokens = keep * x.shape[2]
        shift1, scale1, _, _, _, _ = rows.unbind(2)  # each [B, T, D]
        _, _, gate1, shift2, scale2, gate2 = rows[:, -keep:].unbind(2)  # each [B, keep, D]
        y = self.kernels.modulated_norm(x, scale1, shift1, self.eps).flatten(1, 2)  # [B, T, S, D] -> [B, L, D]
        x = x[:, -keep:]
        shape = x.shape
        y = self.self_attn(y, *rope, mask, tokens, context, made).view(shape)  # [B, keep*S, D] -> [B, keep, S, D]
        x, y = self.kernels.residual_norm(x, y, gate1, self.norm3.weight, self.norm3.bias, self.eps)
        y = self.cross_attn(y.flatten(1, 2), *kv).view(shape)  # [B, keep*S, D] -> [B, keep, S, D]
        x, y = self.kernels.residual_norm(x, y, None, scale2, shift2, self.eps)
        return self.kernels.gated_residual(x, self.ffn(y), gate2)


class Head(nn.Module):
    """The last norm and the projection back to latent patches."""

    kernels: KernelSet = EAGER

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, 4 * config.out_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """x [B, T, S, D], rows [B, T, 2, D] -> [B, T, S, 4*C]."""
        shift, scale = rows.unbind(2)
        return self.head(self.kernels.modulated_norm(x, scale, shift, self.eps))


class ImageEmbedding(nn.Module):
    """CLIP features to the width of the model (Wan2.1 I2V)."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, image_tokens: Tensor) -> Tensor:
        return self.proj(image_tokens)


class DiT(nn.Module):
    """A Wan-family diffusion transformer; `denoise` is the plain call, `forward` the one that compiles."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if config.image_dim:
            self.img_emb = ImageEmbedding(config.image_dim, dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)

    @property
    def layers(self) -> tuple[Block, ...]:
        return tuple(cast(Block, block) for block in self.blocks)

    def time_tables(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Modulation rows for timesteps [R] (0..1000) -> fp32 [N, R, 6, D] for the layers, [R, 2, D] for the head.

        Computed in fp32 whatever the weights' dtype, as the original does.
        """
        half = self.config.freq_dim // 2
        frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timesteps.device) / half)
        angle = torch.outer(timesteps.double(), frequency)  # [R, freq/2]
        e = torch.cat((angle.cos(), angle.sin()), dim=-1).float()  # [R, freq]
        e = _linear32(self.time_embedding[2], F.silu(_linear32(self.time_embedding[0], e)))  # [R, D]
        e0 = _linear32(self.time_projection[1], F.silu(e)).unflatten(-1, (6, -1))  # [R, 6*D] -> [R, 6, D]
        table = torch.stack([block.modulation.float() + e0 for block in self.layers])  # [N, R, 6, D]
        return table, self.head.modulation.float() + e.unsqueeze(1)

    def text_kv(self, text: Tensor, image_tokens: Tensor | None = None) -> TextKV:
        """text [B, text_len, text_dim], image_tokens [B, n, image_dim] -> keys and values of every layer."""
        context = self.text_embedding(text)  # [B, text_len, D]
        k, v = zip(*(block.cross_attn.text_kv(context) for block in self.layers), strict=True)
        if image_tokens is None:
            return TextKV(torch.stack(k), torch.stack(v))
        image = self.img_emb(image_tokens)  # [B, n, D]
        image_k, image_v = zip(*(block.cross_attn.image_kv(image) for block in self.layers), strict=True)
        return TextKV(torch.stack(k), torch.stack(v), torch.stack(image_k), torch.stack(image_v))

    def forward(
        self,
        latents: Tensor,
        modulation: Tensor,
        head_modulation: Tensor,
        rows: Tensor,
        rope: tuple[Tensor, Tensor],
        text: TextKV,
        mask: Tensor | None = None,
        keep: int | None = None,
        context: ContextKV | None = None,
        made: list[KeysValues] | None = None,
    ) -> Tensor:
        """Velocity of the last `keep` blocks (all by default).

        latents [B, C_in, T, H, W]; modulation [N, R, 6, D] and head_modulation [R, 2, D] fp32; rows int64 [B, T], the
        modulation row of every block; rope cos and sin fp32 [L, D/heads/2]; mask bool [L, L], true = may attend. With
        `context`, keys and values of C tokens, the window's first blocks are left out of all of these, and a mask is
        [L, C+L]. Each layer's keys and values of the blocks before the kept ones are added to `made`.
        Returns [B, C_out, keep, H, W]. The last layer computes the kept blocks only, which changes no value.
        """
        batch, _, blocks, height, width = latents.shape
        keep = keep or blocks
        x = self.patch_embedding(latents).flatten(3).permute(0, 2, 3, 1)  # [B, D, T, H/2, W/2] -> [B, T, S, D]
        x = x.contiguous()  # sums keep a layout: every layer would read a token's width in strides, or not at all
        flat = rows.flatten()  # [B, T] -> [B*T]
        last = len(self.blocks) - 1
        for index, block in enumerate(self.layers):
            layer_rows = modulation[index].index_select(0, flat).unflatten(0, (batch, blocks))  # [B, T, 6, D]
            kept = keep if index == last else blocks
            layer_mask = mask if mask is None or index < last else mask[-keep * x.shape[2] :]
            before = None if context is None else context.layer(index)
            x = block(x, layer_rows, rope, text.layer(index), layer_mask, kept, before, made)
            if made is not None:  # copies: views would keep those of the whole window
                tokens, (k, v) = (blocks - keep) * x.shape[2], made[-1]
                made[-1] = (k[:, :, :tokens].clone(), v[:, :, :tokens].clone())
        head_rows = head_modulation.index_select(0, flat).unflatten(0, (batch, blocks))  # [B, T, 2, D]
        x = self.head(x, head_rows[:, -keep:])
        x = x.unflatten(2, (height // 2, width // 2)).unflatten(-1, (2, 2, -1))  # [B, keep, H/2, W/2, 2, 2, C]
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)  # -> [B, C, keep, H, W]

    def denoise(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        image_tokens: Tensor | None = None,
        positions: Sequence[int] | None = None,
    ) -> Tensor:
        """Velocity of every block, building the tables on the way.

        latents [B, C_in, T, H, W]; timesteps [B, T] in 0..1000; text [B, L, text_dim]; image_tokens [B, n, image_dim];
        positions: T block indices, 0..T-1 by default. Returns [B, C_out, T, H, W].
        """
        _, _, blocks, height, width = latents.shape
        distinct, rows = timesteps.unique(return_inverse=True)  # [R], [B, T]
        modulation, head_modulation = self.time_tables(distinct)
        rope = rope_tables(self.config.head_dim, positions or range(blocks), height // 2, width // 2)
        rope = (rope[0].to(latents.device), rope[1].to(latents.device))
        return self(latents, modulation, head_modulation, rows, rope, self.text_kv(text, image_tokens))


def _linear32(layer: nn.Module, x: Tensor) -> Tensor:
    """A Linear layer evaluated in fp32 whatever its weights are stored in."""
    assert isinstance(layer, nn.Linear)
    return F.linear(x, layer.weight.float(), layer.bias.float())
