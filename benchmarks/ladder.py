"""The ablation ladder: every optimisation that exists in the code on a rung of its own, timed against the one below.

Two neighbouring rungs are open at a time and run in turns, so that each ratio is free of what slows the machine for a
while, and models of full size fit.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ..engine.dit import DiT
from ..engine.graphs import Graph, profile_graphs
from ..engine.rope import rope_tables
from ..engine.sampler import TIMESTEPS
from ..engine.spec import Executable
from ..runtime.acceleration import can_fuse
from ..runtime.backend_eager import EagerExecutable
from ..runtime.cuda_graphs import step_capture
from ..runtime.sidecar import dtype_name
from .accelerated import fused_modules
from .backend_compile import CompiledExecutable
from .clock import Timing, Work, time_in_turns
from .flops import graph_flops
from .items import SIGMA, block_work, random, step_call, window_of
from .models import Models
from .rows import PARITY, PeakOf, Row, parity
from .statistics import paired_speedup
from .variants import Graphs, OpenGraph, Variant


@dataclass(frozen=True)
class Rung:
    """One more optimisation than the rung below; `open` makes the work, and dropping it frees its memory."""

    name: str
    what: str
    dtype: torch.dtype
    open: Callable[[], Work]


def ladders(models: Models, narrow: torch.dtype, compiling: bool, cache: Path | None) -> dict[str, list[Rung]]:
    """The rungs of each graph, lowest first. `narrow` is the dtype that fp32 is left for; it may be fp32 itself.

    What is measured of kernels is kept in the folder `cache`.
    """
    window = "stage2_next" if len(models.profile.windows) > 1 else "stage2_first"
    return {
        window: dit_rungs(models, window, narrow, compiling, cache),
        "reference_next": vae_rungs(models, "reference", narrow, compiling, cache),
        "decode_next": vae_rungs(models, "decode", narrow, compiling, cache),
    }


def dit_rungs(models: Models, name: str, narrow: torch.dtype, compiling: bool, cache: Path | None) -> list[Rung]:
    """Of a Stage II window. The lowest rungs compute time tables and text keys in every forward."""

    def plain(dtype: torch.dtype, cached: bool = False) -> Callable[[], Work]:
        return lambda: plain_window(models, name, dtype, cached)

    def step(open_graph: OpenGraph) -> Callable[[], Work]:
        return lambda: _step(variant_of(models, narrow, open_graph), name, models)

    rungs = [Rung("eager_fp32", "tables and text keys made in every forward", torch.float32, plain(torch.float32))]
    if narrow != torch.float32:
        rungs.append(Rung("narrow", f"{dtype_name(narrow)} instead of fp32", narrow, plain(narrow)))
    rungs.append(Rung("cached", "tables and text keys made once", narrow, plain(narrow, cached=True)))
    rungs.append(Rung("pruned", "the last layer computes noisy blocks only", narrow, step(eager(models, narrow))))
    if can_fuse(models.device):
        measured = fused_modules(models, narrow, cache)
        rungs.append(Rung("fused", "kernels that were measured to be no slower", narrow, step(measured)))
        rungs.append(Rung("replayed", "the step as one CUDA graph", narrow, step(captured(measured, models.device))))
    if compiling:
        what = "torch.compile" + (" of the plain model, in place of the last two" if can_fuse(models.device) else "")
        rungs.append(Rung("compile", what, narrow, step(compiled(models, narrow))))
    if compiling and models.device.type == "cuda":
        graphs = compiled(models, narrow, "reduce-overhead")
        rungs.append(Rung("cuda_graphs", "the compiled forward as one CUDA graph", narrow, step(graphs)))
    return rungs


def vae_rungs(
    models: Models, stream: Literal["reference", "decode"], narrow: torch.dtype, compiling: bool, cache: Path | None
) -> list[Rung]:
    """Of one block in the middle of a VAE stream."""
    direction = "encode" if stream == "reference" else "decode"

    def block(dtype: torch.dtype, open_graph: OpenGraph) -> Callable[[], Work]:
        return lambda: block_work(variant_of(models, dtype, open_graph), stream, direction, models)

    rungs = [Rung("eager_fp32", "PyTorch as it is", torch.float32, block(torch.float32, eager(models, torch.float32)))]
    if narrow != torch.float32:
        rungs.append(
            Rung("narrow", f"{dtype_name(narrow)} instead of fp32", narrow, block(narrow, eager(models, narrow)))
        )
    last = eager(models, narrow, channels_last=True)
    rungs.append(Rung("channels_last", "weights of convolutions with channels last", narrow, block(narrow, last)))
    if can_fuse(models.device):
        measured = fused_modules(models, narrow, cache)
        what = "kernels that were measured to be no slower, weights as they were"
        rungs.append(Rung("fused", what, narrow, block(narrow, measured)))
    if compiling:
        rungs.append(Rung("compile", "torch.compile", narrow, block(narrow, compiled(models, narrow))))
    return rungs


def climb(name: str, rungs: Sequence[Rung], models: Models, peak_of: PeakOf, timing: Timing) -> Iterator[Row]:
    """Time each rung in turns with the one below it. The first has no ratio; notes say the product of all so far."""
    flops, product = graph_flops(models.profile, name), 1.0
    for lower, upper in pairwise(rungs):
        works = {lower.name: lower.open(), upper.name: upper.open()}
        limits = {rung.name: PARITY[rung.dtype] for rung in (lower, upper)}
        distances: dict[str, float] = {}

        def compare(
            results: Mapping[str, object],
            limits: dict[str, float] = limits,
            distances: dict[str, float] = distances,
        ) -> None:
            distances.update(parity(results, limits, name))

        samples = time_in_turns(works, models.device, timing, memory=False, on_cold=compare)
        works.clear()
        ratio = paired_speedup(samples[lower.name].warm, samples[upper.name].warm)
        if lower is rungs[0]:
            bound = flops / peak_of(lower.dtype).rate
            yield Row(name, lower.name, samples[lower.name], flops, bound, note=lower.what)
        product *= ratio.value
        note = f"{upper.what}; {product:.2f} times since {rungs[0].name} (product of the steps)"
        bound = flops / peak_of(upper.dtype).rate
        distance = distances[upper.name]
        yield Row(name, upper.name, samples[upper.name], flops, bound, distance, {lower.name: ratio}, note)


def plain_window(models: Models, name: str, dtype: torch.dtype, cached: bool) -> Work:
    """A forward of the DiT on a window, with the velocity of every block; `cached` has tables and text keys ready."""
    profile, device, stage = models.profile, models.device, models.profile.stage2
    dit = cast(DiT, models.module("stage2", dtype))
    blocks, noisy = window_of(profile, name)
    latents = random((1, stage.dit.in_channels, blocks, stage.latent_height, stage.latent_width), dtype, device)
    text = random((1, stage.dit.text_len, stage.dit.text_dim), torch.float32, device, 1).to(dtype)
    rows = (torch.arange(blocks, device=device) >= blocks - noisy).long()[None]  # [1, T]
    if not cached:
        return Work(lambda: _inference(lambda: dit.denoise(latents, rows * SIGMA * TIMESTEPS, text)[:, :, -noisy:]))
    with torch.inference_mode():
        tables = dit.time_tables(torch.tensor([0.0, SIGMA * TIMESTEPS], device=device))
        keys = dit.text_kv(text)
    cos, sin = rope_tables(stage.dit.head_dim, range(blocks), stage.latent_height // 2, stage.latent_width // 2)
    rope = (cos.to(device), sin.to(device))
    return Work(lambda: _inference(lambda: dit(latents, *tables, rows, rope, keys)[:, :, -noisy:]))


def variant_of(models: Models, dtype: torch.dtype, open_graph: OpenGraph) -> Variant:
    graphs = Graphs(profile_graphs(models.profile, dtype), open_graph, models.device)
    return Variant("rung", "rung", dtype, models.profile, graphs)


def eager(models: Models, dtype: torch.dtype, channels_last: bool = False) -> OpenGraph:
    """How eager opens a graph; `channels_last` copies the weights into that layout, which results then take."""
    kept: dict[str, nn.Module] = {}

    def open_graph(graph: Graph) -> Executable:
        if not channels_last:
            return EagerExecutable(graph, models.module(graph.weights, dtype))
        if graph.weights not in kept:
            kept[graph.weights] = copy.deepcopy(models.module(graph.weights, dtype))
            for parameter in kept[graph.weights].parameters():
                layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(parameter.ndim)
                if layout is not None:
                    parameter.data = parameter.data.contiguous(memory_format=layout)
        return EagerExecutable(graph, kept[graph.weights])

    return open_graph


def captured(open_graph: OpenGraph, device: torch.device) -> OpenGraph:
    """The same, denoising steps captured."""
    capture = step_capture(device)
    return lambda graph: capture(open_graph(graph))


def compiled(models: Models, dtype: torch.dtype, mode: str | None = None) -> OpenGraph:
    return lambda graph: CompiledExecutable(graph, models.module(graph.weights, dtype), mode)


def _step(variant: Variant, name: str, models: Models) -> Work:
    stage = models.profile.stage2
    blocks, _ = window_of(models.profile, name)
    shape = (1, stage.dit.in_channels, blocks, stage.latent_height, stage.latent_width)
    text = random((1, stage.dit.text_len, stage.dit.text_dim), torch.float32, models.device, 1)
    return Work(step_call(variant, name, random(shape, variant.dtype, models.device), text, None))


def _inference(call: Callable[[], Tensor]) -> Tensor:
    with torch.inference_mode():
        return call()
