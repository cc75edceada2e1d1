"""What a build would do, without doing it: graphs, shapes, sizes to expect. Nothing is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..engine.dit import DiT
from ..engine.graphs import profile_graphs
from ..engine.manifest import PRECISIONS, Precision
from ..engine.profile import Profile
from ..engine.spec import GraphSpec, TensorSpec
from .build import pick_graphs
from .builders import find_builder
from .fp8 import block_linears, narrow_bytes
from .onnx_pieces import piece_count, piece_weights
from .reads import meta_modules, read_parameters


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
    modules = meta_modules(profile, graphs.values(), dtype)
    planned = []
    for name in pick_graphs(graphs, names):
        graph = graphs[name]
        module = modules[graph.weights]
        in_fp8 = block_linears(module) if precision == "fp8" and isinstance(module, DiT) else ()
        narrow = {f"{name}.weight" for name in in_fp8}
        read = read_parameters(graph, module).items()
        size = sum(narrow_bytes(tensor) if name in narrow else tensor.nbytes for name, tensor in read)
        pieces = 1 if builder.process_memory is None else piece_count(size, graph.spec.donated_bytes)
        planned.append(PlannedGraph(graph.spec, graph.weights, size, pieces))
    loaded = sum(tensor.nbytes for module in modules.values() for tensor in module.parameters())
    memory = loaded + 2 * max(graph.bytes for graph in planned)
    if builder.process_memory is None:
        return Plan(profile.name, backend, precision, tuple(planned), memory)
    largest = sorted((builder.process_memory(piece_weights(graph.bytes)) for graph in planned), reverse=True)
    return Plan(profile.name, backend, precision, tuple(planned), memory, sum(largest[:jobs]))


def shape_words(spec: GraphSpec) -> str:
    """The first tensor in and the first out, which is what a graph is about."""
    return f"{_words(spec.inputs[0])} -> {_words(spec.outputs[0])}"


def _words(tensor: TensorSpec) -> str:
    return f"{tensor.name} {'x'.join(map(str, tensor.shape))}"
