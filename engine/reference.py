"""The hybrid reference: motion from Stage I, and the image itself as the first frame, in Stage II's latents."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import Executables, stream_call
from .stage1 import decode_motion
from .vae_layers import VaeCache, fold_time, unfold_time


def upsample(pixels: Tensor, height: int, width: int) -> Tensor:
    """Bicubic, frame by frame: [B, 3, T, h, w] in [-1, 1] -> [B, 3, T, height, width] in [-1, 1]."""
    frames = F.interpolate(fold_time(pixels).float(), size=(height, width), mode="bicubic", align_corners=False)
    return unfold_time(frames, pixels.shape[0]).clamp(-1, 1)


def reference_first(graphs: Executables, image: Tensor, motion: Tensor) -> tuple[Tensor, VaeCache, VaeCache]:
    """Block 0 of the reference: the image [1, 3, 1, H, W] encoded. Stage I's own first frame is decoded and dropped.

    Returns the block fp32 [1, C2, 1, h, w] and the caches of the motion decoder and the reference encoder.
    """
    _, motion_cache = decode_motion(graphs, motion, 0, ())
    block, reference_cache = stream_call(graphs, "reference", image, ())
    return block.float(), motion_cache, reference_cache


def reference_next(
    graphs: Executables,
    motion: Tensor,
    block: int,
    size: tuple[int, int],
    motion_cache: VaeCache,
    reference_cache: VaeCache,
) -> tuple[Tensor, VaeCache, VaeCache]:
    """Block `block` > 0 of the reference: decode the motion block, upsample to size (height, width), encode.

    Returns the block fp32 [1, C2, 1, h, w] and both caches; blocks go in order.
    """
    pixels, motion_cache = decode_motion(graphs, motion, block, motion_cache)
    latents, reference_cache = stream_call(graphs, "reference", upsample(pixels, *size), reference_cache)
    return latents.float(), motion_cache, reference_cache


def reference_blocks(
    graphs: Executables,
    motion: Tensor,
    blocks: tuple[int, ...],
    size: tuple[int, int],
    motion_cache: VaeCache,
    reference_cache: VaeCache,
) -> tuple[Tensor, VaeCache, VaeCache]:
    """Several consecutive reference blocks fp32 [1, C2, len(blocks), h, w], and both caches."""
    made = []
    for block in blocks:
        latents, motion_cache, reference_cache = reference_next(
            graphs, motion, block, size, motion_cache, reference_cache
        )
        made.append(latents)
    return torch.cat(made, dim=2), motion_cache, reference_cache
