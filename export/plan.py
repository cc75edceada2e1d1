"""What a build would do, without doing it: graphs, shapes, sizes to expect. Nothing is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..engine.dit import DiT
from ..engine.graphs import Graph, profile_graphs
from ..engine.manifest import PRECISIONS, Precision
from ..engine.profile import Profile
from ..engine.spec import GraphSpec, TensorSpec
from ..engine.vae import VAE
from .build import pick_graphs
from .builders import find_builder
from .onnx_pieces import piece_count


@dataclass(frozen=True)
class PlannedGraph:
    """A graph, the bytes of the weights that it reads, which is about the size of its artifacts, and how many pieces
    it is compiled in."""

    spec: GraphSpec
    weights: str
    bytes: int
    pieces: int = 1


@dataclass(frozen=True)
class Plan:
    """The graphs of a build, and the bytes of memory it takes about.

    `memory`: all modules, and twice over the largest graph's weights. `process_memory`: the processes that work beside.
    """

    profile: str
    backend: str
    precision: Precision
    graphs: tuple[PlannedGraph, ...]
    memory: int
    process_memory: int = 0


def plan_build(
    profile: Profile, backend: str, precision: Precision, names: Sequence[str] | None = None, jobs: int = 1
) -> Plan:
    """Run every graph on meta tensors and see which weights it reads."""
    dtype, builder = PRECISIONS[precision], find_builder(backend)
    graphs = profile_graphs(profile, dtype)
    modules = _meta_modules(profile, graphs, dtype)
    planned = []
    for name in pick_graphs(graphs, names):
        size = _weight_bytes(graphs[name], modules)
        pieces = 1 if builder.process_memory is None else piece_count(size)
        planned.append(PlannedGraph(graphs[name].spec, graphs[name].weights, size, pieces))
    loaded = sum(tensor.nbytes for module in modules.values() for tensor in module.parameters())
    memory = loaded + 2 * max(graph.bytes for graph in planned)
    if builder.process_memory is None:
        return Plan(profile.name, backend, precision, tuple(planned), memory)
    largest = sorted((builder.process_memory(graph.bytes // graph.pieces) for graph in planned), reverse=True)
    return Plan(profile.name, backend, precision, tuple(planned), memory, sum(largest[:jobs]))


def shape_words(spec: GraphSpec) -> str:
    """The first tensor in and the first out, which is what a graph is about."""
    return f"{_words(spec.inputs[0])} -> {_words(spec.outputs[0])}"


def _words(tensor: TensorSpec) -> str:
    return f"{tensor.name} {'x'.join(map(str, tensor.shape))}"


def _meta_modules(profile: Profile, graphs: dict[str, Graph], dtype: torch.dtype) -> dict[str, nn.Module]:
    configs = {"vae1": profile.stage1.vae, "vae2": profile.stage2.vae}
    modules: dict[str, nn.Module] = {}
    with torch.device("meta"):
        for name in {graph.weights: None for graph in graphs.values()}:
            if name in configs:
                modules[name] = VAE(configs[name])
            else:
                modules[name] = DiT((profile.stage2 if name == "stage2" else profile.stage1).dit)
    for module in modules.values():
        for parameter in module.parameters():  # buffers stay fp32
            parameter.data = parameter.data.to(dtype)
    return modules


def _weight_bytes(graph: Graph, modules: dict[str, nn.Module]) -> int:
    module = graph.build(modules[graph.weights], False)
    feed = [torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in graph.spec.inputs]
    with torch.inference_mode(), _Watch(module) as watch:
        module(*feed)
    return sum(prod(tensor.shape) * tensor.dtype.itemsize for tensor in watch.read.values())


class _Watch(TorchDispatchMode):
    """Notes which parameters operations read."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._parameters = {id(parameter): parameter for parameter in module.parameters()}
        self.read: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if id(leaf) in self._parameters:
                self.read[id(leaf)] = leaf
        return func(*args, **(kwargs or {}))
