"""Prompt encoders that need no transformers: the words of `nano`, and embeddings that are ready."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..engine.errors import WeightsError
from ..engine.text import WordEncoder
from .conditioning import Embeddings


@dataclass(frozen=True, eq=False)
class WordPrompts:
    """The small word encoder as a PromptEncoder."""

    model: WordEncoder
    fingerprint: str

    def encode_all(self, prompts: Sequence[str]) -> list[Tensor]:
        """fp32 [1, text_len, D] for each prompt, zero past its end."""
        return [self.model.encode(prompt) for prompt in prompts]


@dataclass(frozen=True, eq=False)
class GivenPrompts:
    """Ready embeddings as a PromptEncoder: the first prompt is `prompt`, the second `negative`, whatever they say."""

    embeddings: Embeddings
    fingerprint: str

    def encode_all(self, prompts: Sequence[str]) -> list[Tensor]:
        """fp32 [1, text_len, D] for each prompt. Raises WeightsError where the file has no negative and one is due."""
        if len(prompts) > 1 and self.embeddings.negative is None:
            raise WeightsError(
                "embeddings: got no tensor `negative`, want one, as guidance is on; add it, or pass --guidance 1"
            )
        return [tensor for tensor in (self.embeddings.prompt, self.embeddings.negative) if tensor is not None][
            : len(prompts)
        ]
