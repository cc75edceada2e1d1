"""The small prompt encoder of the `nano` profile: hashed words and one attention layer, trained jointly with Stage I.

Its output keeps the contract of UMT5 as Wan reads it: a fixed number of rows, zero past the end of the prompt.

Axes: B batch, L rows (text_len), D width (text_dim).
"""

import math
import re
import unicodedata
import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ProfileError

PADDING = 0


def split_words(prompt: str) -> list[str]:
    """The lower-case words of a prompt, in any script; a run of text without spaces is one word."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", prompt).lower())


class WordEncoder(nn.Module):
    """Prompts to text rows [B, L, D]; words share `vocabulary` - 1 hash buckets, bucket 0 is padding."""

    def __init__(self, vocabulary: int, text_dim: int, text_len: int) -> None:
        super().__init__()
        if vocabulary < 2:
            raise ProfileError(f"text vocabulary: got {vocabulary}, want 2 or more; the nearest is 2")
        self.vocabulary = vocabulary
        self.text_len = text_len
        self.heads = math.gcd(text_dim, 4)
        self.embedding = nn.Embedding(vocabulary, text_dim, padding_idx=PADDING)
        self.positions = nn.Parameter(0.1 * torch.randn(text_len, text_dim))
        self.norm1 = nn.LayerNorm(text_dim)
        self.qkv = nn.Linear(text_dim, 3 * text_dim)
        self.out = nn.Linear(text_dim, text_dim)
        self.norm2 = nn.LayerNorm(text_dim)
        self.ffn = nn.Sequential(nn.Linear(text_dim, 4 * text_dim), nn.GELU("tanh"), nn.Linear(4 * text_dim, text_dim))
        self.norm = nn.LayerNorm(text_dim)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Bucket numbers int64 [B, L] on the CPU; words past the first `text_len` of a prompt are dropped."""
        tokens = torch.full((len(prompts), self.text_len), PADDING, dtype=torch.int64)
        for row, prompt in zip(tokens, prompts, strict=True):
            # crc32 and not hash(): Python salts hash() anew in every process, the weights outlive it.
            buckets = [1 + zlib.crc32(word.encode()) % (self.vocabulary - 1) for word in split_words(prompt)]
            buckets = buckets[: self.text_len]
            row[: len(buckets)] = torch.tensor(buckets, dtype=torch.int64)
        return tokens

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [B, L] -> [B, L, D]; rows past a prompt's last word are zero."""
        words = tokens != PADDING  # [B, L]
        x = self.embedding(tokens) + self.positions  # [B, L, D]
        x = x + self._attend(self.norm1(x), words)
        x = x + self.ffn(self.norm2(x))
        return self.norm(x).masked_fill(~words.unsqueeze(-1), 0)

    def _attend(self, x: Tensor, words: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, L, 3D] -> [B, L, 3, heads, D/heads]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # -> 3 x [B, heads, L, D/heads]
        # Every row may see itself: without it an empty prompt has nothing to attend to, which is NaN.
        itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        mask = words[:, None, None, :] | itself  # [B, 1, 1, L] | [L, L] -> [B, 1, L, L]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))  # [B, heads, L, D/heads] -> [B, L, D]

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """One prompt -> fp32 [1, L, D] on the encoder's device; no gradient, for training call `forward`."""
        return self(self.tokenize([prompt]).to(self.embedding.weight.device)).float()
