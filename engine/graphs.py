"""The graphs of a profile: what every backend compiles, and the eager module each one comes from.

A graph module takes tensors in the order of its spec and returns a tuple in that order. Batch is 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast

import torch
from torch import Tensor, nn

from .dit import ContextKV, DiT, KeysValues, TextKV
from .profile import DiTConfig, Profile, StageConfig, VAEConfig
from .spec import GraphSpec, TensorSpec
from .vae import VAE
from .vae_layers import VaeCache

Direction = Literal["encode", "decode"]
ROWS = 2  # modulation rows of a step: timestep 0 and the step's own


@dataclass(frozen=True)
class Graph:
    """A spec, the name of the weights it runs on, and how to build its module from them.

    `build(weights, donate)`: with `donate` the module updates donated inputs in place.
    """

    spec: GraphSpec
    weights: str
    build: Callable[[nn.Module, bool], nn.Module]


class TimeGraph(nn.Module):
    """Timesteps to modulation rows."""

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, timesteps: Tensor) -> tuple[Tensor, ...]:
        return self.dit.time_tables(timesteps)


class TextGraph(nn.Module):
    """Prompt embeddings (and image tokens) to keys and values of every layer."""

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, text: Tensor, image_tokens: Tensor | None = None) -> tuple[Tensor, ...]:
        kv = self.dit.text_kv(text, image_tokens)
        if kv.image_k is None or kv.image_v is None:
            return kv.k, kv.v
        return kv.k, kv.v, kv.image_k, kv.image_v


@dataclass(frozen=True)
class StepKind:
    """What a step graph takes and gives beside a DiT's usual tensors: a mask, and keys and values of the window's first
    `context` tokens, which it gives, or `reads` instead of the tokens."""

    masked: bool = False
    context: int = 0
    reads: bool = False

    @property
    def gives(self) -> bool:
        return self.context > 0 and not self.reads


class StepGraph(nn.Module):
    """One forward of a DiT, giving the velocity of the last `keep` blocks."""

    def __init__(self, dit: DiT, keep: int, kind: StepKind) -> None:
        super().__init__()
        self.dit = dit
        self.keep = keep
        self.kind = kind

    def forward(
        self,
        latents: Tensor,
        rows: Tensor,
        cos: Tensor,
        sin: Tensor,
        modulation: Tensor,
        head_modulation: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        mask, rest = (rest[0], rest[1:]) if self.kind.masked else (None, rest)
        context, kv = (ContextKV(*rest[:2]), rest[2:]) if self.kind.reads else (None, rest)
        made: list[KeysValues] | None = [] if self.kind.gives else None
        velocity = self.dit(
            latents, modulation, head_modulation, rows, (cos, sin), TextKV(*kv), mask, self.keep, context, made
        )
        if made is None:
            return (velocity,)
        k, v = (torch.stack(each) for each in zip(*made, strict=True))
        return velocity, k, v  # k and v [N, B, heads, context tokens, D/heads]


class VaeGraph(nn.Module):
    """One call of a VAE stream; without caches it is the clip's first."""

    def __init__(self, vae: VAE, direction: Direction, donate: bool) -> None:
        super().__init__()
        self.vae = vae
        self.direction = direction
        self.donate = donate

    def forward(self, x: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        run = self.vae.encode_chunk if self.direction == "encode" else self.vae.decode_chunk
        y, new = run(x, caches or None, self.donate)
        return (y, *new)


def profile_graphs(profile: Profile, dtype: torch.dtype) -> dict[str, Graph]:
    """Every graph of a profile by name; activations and weights are `dtype`, tables are fp32."""
    graphs: list[Graph] = []
    stage1, stage2 = profile.stage1, profile.stage2
    for expert in stage1.experts:
        name = f"stage1_{expert}" if expert else "stage1"
        graphs += _text_graphs(name, stage1.dit, dtype)
        graphs.append(_step_graph(f"{name}_step", name, stage1, profile.blocks, profile.blocks, StepKind(), dtype))
    graphs += _text_graphs("stage2", stage2.dit, dtype)
    for suffix, window in zip(("first", "next"), profile.windows, strict=False):
        graphs += _window_graphs(f"stage2_{suffix}", profile, window, dtype)
    graphs += _vae_graphs("image", "vae1", stage1, "encode", dtype)
    graphs += _vae_graphs("motion", "vae1", stage1, "decode", dtype)
    graphs += _vae_graphs("reference", "vae2", stage2, "encode", dtype)
    graphs += _vae_graphs("decode", "vae2", stage2, "decode", dtype)
    return {graph.spec.name: graph for graph in graphs}


def stage_of(profile: Profile, weights: str) -> StageConfig:
    """The stage that weights of that name belong to."""
    return profile.stage2 if weights in ("stage2", "vae2") else profile.stage1


def new_module(profile: Profile, weights: str) -> nn.Module:
    """The module that weights of that name are for, with initial values."""
    stage = stage_of(profile, weights)
    return VAE(stage.vae) if weights.startswith("vae") else DiT(stage.dit)


def _text_graphs(weights: str, dit: DiTConfig, dtype: torch.dtype) -> list[Graph]:
    time = GraphSpec(
        f"{weights}_time",
        (TensorSpec("timesteps", "R", (ROWS,), torch.float32),),
        _table_specs(dit),
    )
    inputs = [TensorSpec("text", "B L D", (1, dit.text_len, dit.text_dim), dtype)]
    if dit.image_dim:
        inputs.append(TensorSpec("image_tokens", "B L D", (1, dit.image_tokens, dit.image_dim), dtype))
    text = GraphSpec(f"{weights}_text", tuple(inputs), _kv_specs(dit, dtype))
    return [
        Graph(time, weights, lambda module, _: TimeGraph(cast(DiT, module))),
        Graph(text, weights, lambda module, _: TextGraph(cast(DiT, module))),
    ]


def _table_specs(dit: DiTConfig) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec("modulation", "N R 6 D", (dit.layers, ROWS, 6, dit.dim), torch.float32),
        TensorSpec("head_modulation", "R 2 D", (ROWS, 2, dit.dim), torch.float32),
    )


def _kv_specs(dit: DiTConfig, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
    lengths = {"text": dit.text_len, "image": dit.image_tokens} if dit.image_dim else {"text": dit.text_len}
    return tuple(
        TensorSpec(f"{name}_{kind}", "N B heads L D", (dit.layers, 1, dit.heads, length, dit.head_dim), dtype)
        for name, length in lengths.items()
        for kind in ("k", "v")
    )


def _window_graphs(name: str, profile: Profile, window: int, dtype: torch.dtype) -> list[Graph]:
    """The step of one window, and where the context is reused that of its later steps, on the last M blocks alone."""
    stage, noisy, masked = profile.stage2, profile.noisy, profile.context == "one-way"
    if not profile.reuse_context:
        return [_step_graph(name, "stage2", stage, window, noisy, StepKind(masked), dtype)]
    context = (window - noisy) * stage.block_tokens
    return [
        _step_graph(name, "stage2", stage, window, noisy, StepKind(masked, context), dtype),
        _step_graph(f"{name}_later", "stage2", stage, noisy, noisy, StepKind(masked, context, reads=True), dtype),
    ]


def _step_graph(
    name: str, weights: str, stage: StageConfig, blocks: int, keep: int, kind: StepKind, dtype: torch.dtype
) -> Graph:
    """The step on `blocks` blocks, of which the last `keep` get a velocity."""
    dit, height, width = stage.dit, stage.latent_height, stage.latent_width
    tokens = blocks * stage.block_tokens
    before = kind.context if kind.reads else 0
    context_shape = (dit.layers, 1, dit.heads, kind.context, dit.head_dim)
    context = tuple(TensorSpec(f"context_{part}", "N B heads L D", context_shape, dtype) for part in ("k", "v"))
    inputs = [
        TensorSpec("latents", "B C T H W", (1, dit.in_channels, blocks, height, width), dtype),
        TensorSpec("rows", "B T", (1, blocks), torch.int64),
        TensorSpec("cos", "L D", (tokens, dit.head_dim // 2), torch.float32),
        TensorSpec("sin", "L D", (tokens, dit.head_dim // 2), torch.float32),
        *_table_specs(dit),
    ]
    if kind.masked:
        inputs.append(TensorSpec("mask", "L L", (tokens, before + tokens), torch.bool))
    if kind.reads:
        inputs += context
    velocity = TensorSpec("velocity", "B C T H W", (1, dit.out_channels, keep, height, width), dtype)
    outputs = (velocity, *context) if kind.gives else (velocity,)
    spec = GraphSpec(name, (*inputs, *_kv_specs(dit, dtype)), outputs)
    return Graph(spec, weights, lambda module, _: StepGraph(cast(DiT, module), keep, kind))


def _vae_graphs(name: str, weights: str, stage: StageConfig, direction: Direction, dtype: torch.dtype) -> list[Graph]:
    vae = stage.vae
    pixels = [(1, 3, frames, stage.height, stage.width) for frames in (1, vae.time)]
    block = (1, vae.latent_channels, 1, stage.latent_height, stage.latent_width)
    cache = [tuple(tensor.shape) for tensor in cache_shapes(vae, direction, stage.height, stage.width)]

    def build(module: nn.Module, donate: bool) -> nn.Module:
        return VaeGraph(cast(VAE, module), direction, donate)

    def caches(donated: bool) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(f"cache_{index:02d}", "B C T H W", shape, dtype, donated) for index, shape in enumerate(cache)
        )

    graphs = []
    for suffix, frames, old in (("first", pixels[0], ()), ("next", pixels[1], caches(donated=True))):
        image = TensorSpec("pixels", "B C T H W", frames, dtype)
        latent = TensorSpec("latents", "B C T H W", block, dtype)
        given, made = (image, latent) if direction == "encode" else (latent, image)
        spec = GraphSpec(f"{name}_{suffix}", (given, *old), (made, *caches(donated=False)))
        graphs.append(Graph(spec, weights, build))
    return graphs


@lru_cache
def cache_shapes(config: VAEConfig, direction: Direction, height: int, width: int) -> VaeCache:
    """Meta tensors of the caches of one stream for pixels of height x width, in order."""
    with torch.device("meta"), torch.inference_mode():
        vae = VAE(config)
        if direction == "encode":
            return vae.encode_chunk(torch.empty(1, 3, 1, height, width), None)[1]
        shape = (1, config.latent_channels, 1, height // config.spatial, width // config.spatial)
        return vae.decode_chunk(torch.empty(shape), None)[1]
