"""A large ONNX file as several that run one after another, cut where the least has to be handed on.

Compilers need memory for several copies of the weights that they see. And an engine cannot write over what it reads: in
one piece, a VAE's new caches would lie beside all the old ones. The pieces share one file of weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil, prod
from pathlib import Path
from typing import Any

from .onnx_file import require_onnx

PIECE = 2 * 10**9  # bytes of weights that are compiled together, about
CACHES = 10**9  # bytes of caches that one piece renews, about
RENEWALS = 4  # of the largest caches in a call: it runs the large stages of a VAE once for each frame of a block
NEAR = 0.25  # of a piece: how far from equal pieces a cut may be, to find a narrow place


@dataclass(frozen=True)
class Cuts:
    """What the nodes of a graph need, in order: node i is `loads[i]` of a piece, by the weights that it is the first to
    read and the caches that it makes; `crossing[i]` bytes are made before node i and read from there on."""

    loads: tuple[float, ...]
    crossing: tuple[int, ...]


def piece_count(weights: int, caches: int) -> int:
    """How many pieces a graph with that many bytes of weights and of caches is compiled in."""
    renewed = RENEWALS * caches if caches > CACHES else 0  # few may lie there twice
    return max(1, ceil(weights / PIECE + renewed / CACHES))


def piece_weights(weights: int) -> int:
    """The bytes of weights that one piece of such a graph has, about, and no more than that where caches cut it too."""
    return weights // piece_count(weights, 0)


def split_onnx(file: Path, count: int) -> list[Path]:
    """Files of about equal loads beside `file`, in the order they run; the file itself if one is enough.

    What a piece hands on is an output of it, under the name that it has in the graph.
    """
    if count == 1:
        return [file]
    onnx, _ = require_onnx()
    model = onnx.load(file, load_external_data=False)
    bounds = [0, *choose_cuts(measure(onnx, model), count), len(model.graph.node)]
    paths = []
    for index, (start, end) in enumerate(pairwise(bounds)):
        paths.append(file.with_name(f"{file.stem}-{index:02d}{file.suffix}"))
        onnx.save(_piece(onnx, model, start, end), paths[-1])
    return paths


def choose_cuts(cuts: Cuts, count: int) -> list[int]:
    """The nodes before which to cut, for `count` pieces."""
    total, reached = sum(cuts.loads), [0.0, *accumulate(cuts.loads)][:-1]  # reached: by the nodes before each
    chosen: list[int] = []
    for index in range(1, count):
        target = total * index / count
        later = range(max(chosen, default=0) + 1, len(reached))
        near = [i for i in later if abs(reached[i] - target) <= NEAR * total / count]
        if not near:  # where a single node is more than that
            near = sorted(later, key=lambda i: abs(reached[i] - target))[:1]
        chosen += sorted(near, key=lambda i: (cuts.crossing[i], abs(reached[i] - target)))[:1]
    return chosen


def measure(onnx: Any, model: Any) -> Cuts:
    """Loads and crossing bytes of a graph's nodes."""
    graph = model.graph
    left = {info.name for info in graph.output}
    cache = {_value_kind(info) for info in graph.input if f"{info.name}_out" in left}
    kinds = {info.name: _value_kind(info) for info in (*graph.value_info, *graph.output)}
    sizes = {tensor.name: _bytes(onnx, tensor.data_type, tensor.dims) for tensor in graph.initializer}
    last = {name: index for index, node in enumerate(graph.node) for name in node.input}
    made_bytes = {name: _bytes(onnx, *kind) for name, kind in kinds.items()}
    loads, crossing, open_bytes = [], [], 0
    closing = [0] * (len(graph.node) + 1)
    known: set[str] = set()
    for index, node in enumerate(graph.node):
        open_bytes -= closing[index]
        crossing.append(open_bytes)
        new = {name for name in node.input if name in sizes} - known
        known |= new
        renewed = sum(made_bytes[name] for name in node.output if kinds.get(name) in cache)
        loads.append(sum(sizes[name] for name in new) / PIECE + renewed / CACHES)
        for name in node.output:
            if last.get(name, -1) > index:
                open_bytes += made_bytes[name]
                closing[last[name] + 1] += made_bytes[name]
    return Cuts(tuple(loads), tuple(crossing))


def _piece(onnx: Any, model: Any, start: int, end: int) -> Any:
    """The nodes from start to end as a model, whose weights lie where they did."""
    graph = model.graph
    nodes = graph.node[start:end]
    infos = {info.name: info for info in (*graph.value_info, *graph.input, *graph.output)}
    read, made = _names(nodes, "input"), _names(nodes, "output")
    weights = [tensor for tensor in graph.initializer if tensor.name in read]
    later = set(_names(graph.node[end:], "input")) | {info.name for info in graph.output}
    constant = {tensor.name for tensor in weights}
    given = [infos[name] for name in read if name not in made and name not in constant]
    left = [infos[name] for name in made if name in later]
    inner = [info for info in graph.value_info if info.name in made]
    part = onnx.helper.make_graph(nodes, graph.name, given, left, weights, value_info=inner)
    return onnx.helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)


def _names(nodes: Sequence[Any], side: str) -> dict[str, None]:
    """The names that nodes read or write, each once, in order; an input that is left out has none."""
    return {name: None for node in nodes for name in getattr(node, side) if name}


def _value_kind(info: Any) -> tuple[int, tuple[int, ...]]:
    kind = info.type.tensor_type
    return kind.elem_type, tuple(axis.dim_value for axis in kind.shape.dim)


def _bytes(onnx: Any, dtype: int, shape: Sequence[int]) -> int:
    return prod(shape) * onnx.helper.tensor_dtype_to_np_dtype(dtype).itemsize
