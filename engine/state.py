"""What is constant for a clip, and what one segment hands to the next: plain tensors, never changed in place."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .errors import SpecError
from .spec import is_freed
from .vae_layers import VaeCache


@dataclass(frozen=True)
class Conditions:
    """What one DiT reads that does not change within a clip."""

    tables: tuple[Mapping[str, Tensor], ...]  # modulation rows of every step; row 0 is timestep 0, row 1 the step's
    text: Mapping[str, Tensor]  # keys and values of the prompt
    negative: Mapping[str, Tensor] | None = None  # those of the negative prompt, with guidance only
    guidance: float = 1.0


@dataclass(frozen=True)
class SegmentState:
    """Everything the next segment needs; saving it and loading it again continues to the same pixels.

    latents and reference hold the last final blocks, at most N+M-1 of them: fp32 [1, C2, K, H, W]. The caches are
    donated to the next call: use `clone` to keep a state beyond it.
    """

    segment: int  # index of the next segment
    anchor: Tensor  # [1, C2, 1, H, W], the image's block: clean latents and reference at once
    latents: Tensor
    reference: Tensor
    motion_cache: VaeCache  # Stage I decoder
    reference_cache: VaeCache  # Stage II encoder
    decoder_cache: VaeCache  # Stage II decoder; empty before the first segment

    def clone(self) -> "SegmentState":
        """A copy that shares no memory with this one. SpecError where that was donated and its memory is gone."""
        for cache in (*self.motion_cache, *self.reference_cache, *self.decoder_cache):
            if is_freed(cache):
                raise SpecError(
                    "segment state: got one that the next segment took, want one before that; clone it then"
                )
        return SegmentState(
            segment=self.segment,
            anchor=self.anchor.clone(),
            latents=self.latents.clone(),
            reference=self.reference.clone(),
            motion_cache=tuple(cache.clone() for cache in self.motion_cache),
            reference_cache=tuple(cache.clone() for cache in self.reference_cache),
            decoder_cache=tuple(cache.clone() for cache in self.decoder_cache),
        )
