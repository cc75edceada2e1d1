"""Stage II: Conditional Segment-wise Generation. A segment is encoded, denoised and decoded before the next starts."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from .calls import NOTHING, Executables, guided_velocity, stream_call, window_feed
from .profile import Profile
from .reference import reference_blocks, reference_first
from .sampler import block_noise, euler_sample
from .segments import Segment
from .spec import Executable
from .state import Conditions, SegmentState


def start_state(graphs: Executables, image: Tensor, motion: Tensor) -> SegmentState:
    """The state before the first segment. image [1, 3, 1, H, W] in [-1, 1]; motion [1, z, F, h', w']."""
    anchor, motion_cache, reference_cache = reference_first(graphs, image, motion)
    empty = anchor[:, :, :0]
    return SegmentState(0, anchor, empty, empty, motion_cache, reference_cache, ())


def denoise_segment(
    graphs: Sequence[Executable],
    profile: Profile,
    segment: Segment,
    state: SegmentState,
    conditions: Conditions,
    reference: Tensor,
    noise: Tensor,
    sigmas: Sequence[float],
    on_step: Callable[[int], None] | None = None,
) -> tuple[Tensor, SegmentState]:
    """The latents of one segment's noisy blocks fp32 [1, C2, m, H, W], and the state with them in it.

    Reference and noise belong to the noisy blocks [1, C2, m, H, W]. Clean blocks enter with their final latents at
    timestep 0 and leave unchanged; where the profile reuses the context, later steps read the keys and values that they
    had in the first. `graphs` has the step graphs of this window's length: window_graphs.
    """
    context, made = len(segment.context), len(segment.noisy)
    clean = torch.cat((state.anchor, _last(state.latents, context)), dim=2)  # [1, C2, 1+context, H, W]
    channels = torch.cat((state.anchor, _last(state.reference, context), reference), dim=2)  # [1, C2, T, H, W]
    if not profile.reference:
        channels = torch.zeros_like(channels)
    positions = segment.window if profile.positions == "absolute" else range(len(segment.window))
    feeds = [
        window_feed(graph, positions, segment.clean, profile.stage2.dit.head_dim, noise.device) for graph in graphs
    ]
    given, kept = graphs[0].spec.inputs[0], NOTHING

    def velocity(x: Tensor, step: int) -> Tensor:
        nonlocal kept
        latents = torch.cat((clean, x), dim=2)  # [1, C2, T, H, W]
        if profile.concatenated:
            latents = torch.cat((latents, channels), dim=1)  # [1, 2*C2, T, H, W]
        later = step > 0 and len(graphs) > 1
        graph, feed = graphs[later], feeds[later]
        latents = _last(latents, graph.spec.inputs[0].shape[2]).to(given.dtype)
        value, made_here = guided_velocity(graph, conditions, step, {"latents": latents, **feed}, kept)
        kept = kept if later else made_here
        return _last(value, made)

    start = noise
    if profile.stage2_init == "reference":
        start = (1 - sigmas[0]) * reference + sigmas[0] * noise
    latents = euler_sample(velocity, start, sigmas, on_step)
    back = profile.neighbours + profile.noisy - 1  # as far back as a short last segment reaches
    return latents, replace(
        state,
        segment=segment.index + 1,
        latents=_last(torch.cat((state.latents, latents), dim=2), back),
        reference=_last(torch.cat((state.reference, reference), dim=2), back),
    )


def window_graphs(graphs: Executables, segment: Segment) -> list[Executable]:
    """The step graph of a segment's window, and that of its later steps where there is one."""
    name = "stage2_first" if segment.index == 0 else "stage2_next"
    return [graphs[key] for key in (name, f"{name}_later") if key in graphs]


def run_segment(
    graphs: Executables,
    profile: Profile,
    segment: Segment,
    state: SegmentState,
    conditions: Conditions,
    motion: Tensor,
    seed: int,
    sigmas: Sequence[float],
    on_step: Callable[[int], None] | None = None,
    phase: Callable[[str], AbstractContextManager] = nullcontext,
) -> tuple[Tensor, SegmentState]:
    """One whole segment: encode its reference, denoise, decode. The state's caches are donated.

    `phase(name)` is entered around each of the three, for whoever measures.
    Returns pixels [1, 3, n, H, W] in [-1, 1] (the first segment's begin with frame 0) and the next state.
    """
    size = (profile.height, profile.width)
    with phase("reference"):
        reference, motion_cache, reference_cache = reference_blocks(
            graphs, motion, segment.noisy, size, state.motion_cache, state.reference_cache
        )
        state = replace(state, motion_cache=motion_cache, reference_cache=reference_cache)
    with phase("denoise"):
        noise = block_noise(seed, 2, segment.noisy, (state.anchor.shape[1], *state.anchor.shape[3:]))
        latents, state = denoise_segment(
            window_graphs(graphs, segment), profile, segment, state, conditions, reference, noise.to(motion.device),
            sigmas, on_step,
        )  # fmt: skip
    with phase("decode"):
        return decode_segment(graphs, latents, state)


def decode_segment(graphs: Executables, latents: Tensor, state: SegmentState) -> tuple[Tensor, SegmentState]:
    """Pixels [1, 3, n, H, W] of a segment's latents [1, C2, m, H, W], one block a call, and the state after it."""
    cache, chunks = state.decoder_cache, []
    if not cache:
        pixels, cache = stream_call(graphs, "decode", state.anchor, cache)
        chunks.append(pixels)
    for block in latents.split(1, dim=2):
        pixels, cache = stream_call(graphs, "decode", block, cache)
        chunks.append(pixels)
    return torch.cat(chunks, dim=2), replace(state, decoder_cache=cache)


def _last(x: Tensor, blocks: int) -> Tensor:
    """The last `blocks` blocks of [B, C, T, H, W]; zero is a valid number of them."""
    return x[:, :, x.shape[2] - min(blocks, x.shape[2]) :]
