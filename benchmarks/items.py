"""What is timed of single graphs: one forward of a DiT window, one call of a VAE stream, a whole clip through a VAE.

Every variant gets the same values, and peers the same weights, so that results can be compared before times are.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor

from ..engine.calls import dit_conditions, stream_call, window_feed
from ..engine.dit import DiT
from ..engine.graphs import stage_of
from ..engine.profile import Profile, StageConfig
from ..engine.sampler import TIMESTEPS
from ..engine.vae import VAE
from .clock import Work
from .flops import graph_flops
from .models import Models
from .peers import Peer, PeerDecoder, PeerDiT, PeerEncoder
from .variants import Variant

SIGMA = 0.8  # of the noisy blocks; any would do
STREAMS = {"encode": {"reference": "vae2", "image": "vae1"}, "decode": {"decode": "vae2", "motion": "vae1"}}


@dataclass
class Bench:
    """What is compared: variants of one profile on one device, and peers beside them."""

    models: Models
    variants: dict[str, Variant]
    peers: list[Peer] = field(default_factory=list)

    @property
    def profile(self) -> Profile:
        return self.models.profile


@dataclass
class Item:
    """One row of work: its operations, and a call that does it for every variant. Calls give back a tensor."""

    name: str
    flops: int
    works: dict[str, Work]
    dtypes: dict[str, torch.dtype]
    notes: dict[str, str] = field(default_factory=dict)  # by variant, for its row


def random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Normal values, drawn on the device: a clip at 2K is slow to move there."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, device=device, generator=generator).to(dtype)


def dit_items(bench: Bench, stage: Literal["stage1", "stage2"]) -> list[Item]:
    """One forward of every step graph of a stage."""
    config = getattr(bench.profile, stage)
    if stage == "stage1":
        names = [f"stage1_{expert}_step" if expert else "stage1_step" for expert in config.experts]
    else:
        names = step_names(bench.profile)
    return [_dit_item(bench, name, config) for name in names]


def _dit_item(bench: Bench, name: str, stage: StageConfig) -> Item:
    works, dtypes, models = {}, {}, bench.models
    weights, later = weights_of(name), name.endswith("_later")
    blocks, noisy = window_of(bench.profile, name)
    taken = noisy if later else blocks
    shape = (1, stage.dit.in_channels, taken, stage.latent_height, stage.latent_width)
    text = random((1, stage.dit.text_len, stage.dit.text_dim), torch.float32, models.device, 1)
    image = None
    if stage.dit.image_dim:
        image = random((1, stage.dit.image_tokens, stage.dit.image_dim), torch.float32, models.device, 2)
    for peer in () if later else bench.peers:  # they know no context of an earlier step
        ours = cast(DiT, models.module(weights, torch.float32))
        steps = torch.full((1, blocks), SIGMA * TIMESTEPS, device=models.device)
        steps[:, : blocks - noisy] = 0
        rounded = [None if value is None else value.to(peer.dtype) for value in (text, image)]
        latents = random(shape, peer.dtype, models.device)
        assert rounded[0] is not None
        forward = PeerDiT(peer.dit(ours, models.device), latents, steps, rounded[0], rounded[1])
        works[peer.name], dtypes[peer.name] = Work(_last_of(forward, noisy)), peer.dtype
    for variant in bench.variants.values():
        works[variant.name] = Work(step_call(variant, name, random(shape, variant.dtype, models.device), text, image))
        dtypes[variant.name] = variant.dtype
    return Item(name, graph_flops(bench.profile, name), works, dtypes)


def step_call(variant: Variant, name: str, latents: Tensor, text: Tensor, image: Tensor | None) -> Callable[[], Tensor]:
    """A forward of a step graph on a window of `latents`; tables and text keys are ready, as they are in a clip."""
    graph, weights = variant.graphs[name], weights_of(name)
    tokens = None if image is None else image.to(variant.dtype)
    conditions = dit_conditions(variant.graphs, weights, (SIGMA,), text.to(variant.dtype), image_tokens=tokens)
    blocks, noisy = window_of(variant.profile, name)
    stage = stage_of(variant.profile, weights)
    feed = window_feed(graph, range(blocks), blocks - noisy, stage.dit.head_dim, latents.device)
    context = [tensor for tensor in graph.spec.inputs if tensor.name.startswith("context_")]
    feed |= {tensor.name: random(tensor.shape, tensor.dtype, latents.device) for tensor in context}
    full = {"latents": latents, **feed, **conditions.tables[0], **conditions.text}
    return lambda: graph(full)["velocity"]


def step_names(profile: Profile) -> list[str]:
    """The step graphs of Stage II."""
    names = [f"stage2_{suffix}" for suffix, _ in zip(("first", "next"), profile.windows, strict=False)]
    return names + [f"{name}_later" for name in names if profile.reuse_context]


def weights_of(name: str) -> str:
    """The weights of a step graph."""
    return "stage2" if name.startswith("stage2") else name.removesuffix("_step")


def window_of(profile: Profile, name: str) -> tuple[int, int]:
    """Blocks of a step graph's window, and how many of them are noisy."""
    if not name.startswith("stage2"):
        return profile.blocks, profile.blocks - (0 if profile.image_channels else 1)
    return profile.windows[0 if name.startswith("stage2_first") else 1], profile.noisy


def vae_items(bench: Bench, direction: Literal["encode", "decode"]) -> list[Item]:
    """For each VAE: one block in the middle of a stream, then a whole clip, which is what peers can do too."""
    items = []
    for stream, weights in STREAMS[direction].items():
        works = {name: block_work(v, stream, direction, bench.models) for name, v in bench.variants.items()}
        dtypes = {name: variant.dtype for name, variant in bench.variants.items()}
        first, following = (graph_flops(bench.profile, f"{stream}_{kind}") for kind in ("first", "next"))
        items.append(Item(f"{stream}_next", following, works, dtypes))
        linear = stage_of(bench.profile, weights).vae.linear
        peers = () if linear else bench.peers
        notes = dict.fromkeys(
            bench.variants if linear else (), "with linear maps, which diffusers' VAE has no place for"
        )
        clip = {peer.name: _peer_vae_work(peer, bench, weights, direction) for peer in peers}
        for name, variant in bench.variants.items():
            whole = clip_input(bench.profile, weights, direction, variant.dtype, bench.models.device)
            clip[name] = Work(stream_all(variant, stream, whole, bench.profile.block_frames))
        flops = first + following * (bench.profile.blocks - 1)
        all_dtypes = {peer.name: peer.dtype for peer in peers} | dtypes
        items.append(Item(f"{stream} clip", flops, clip, all_dtypes, notes))
    return items


def clip_input(profile: Profile, weights: str, direction: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Pixels [1, 3, T, H, W] or latents [1, z, F, h, w] of a whole clip."""
    stage = stage_of(profile, weights)
    if direction == "encode":
        return random((1, 3, profile.frames, stage.height, stage.width), dtype, device).clamp_(-1, 1)
    shape = (1, stage.vae.latent_channels, profile.blocks, stage.latent_height, stage.latent_width)
    return random(shape, dtype, device)


def stream_all(variant: Variant, stream: str, whole: Tensor, block_frames: int) -> Callable[[], Tensor]:
    """A whole clip through a VAE, block by block, with its caches."""
    size = block_frames if whole.shape[1] == 3 and stream in STREAMS["encode"] else 1

    def call() -> Tensor:
        made, cache = stream_call(variant.graphs, stream, whole[:, :, :1], ())
        parts = [made]
        for block in whole[:, :, 1:].split(size, dim=2):
            made, cache = stream_call(variant.graphs, stream, block, cache)
            parts.append(made)
        return torch.cat(parts, dim=2)

    return call


def block_work(variant: Variant, stream: str, direction: str, models: Models) -> Work:
    """The next block of a stream; the caches of a call go to the one after it, as they are donated."""
    profile = variant.profile
    weights, size = STREAMS[direction][stream], profile.block_frames if direction == "encode" else 1
    shortest = profile.override(frames=profile.block_frames * profile.noisy + 1)
    whole = clip_input(shortest, weights, direction, variant.dtype, models.device)
    _, cache = stream_call(variant.graphs, stream, whole[:, :, :1], ())
    block = whole[:, :, 1 : 1 + size].clone()

    def call() -> Tensor:
        nonlocal cache
        made, cache = stream_call(variant.graphs, stream, block, cache)
        return made

    return Work(call)


def _peer_vae_work(peer: Peer, bench: Bench, weights: str, direction: str) -> Work:
    ours = cast(VAE, bench.models.module(weights, torch.float32))
    whole = clip_input(bench.profile, weights, direction, peer.dtype, bench.models.device)
    kind = PeerEncoder if direction == "encode" else PeerDecoder
    return Work(kind(peer.vae(ours), ours, whole))


def _last_of(forward: Callable[[], Tensor], blocks: int) -> Callable[[], Tensor]:
    return lambda: forward()[:, :, -blocks:]
