"""What TensorRT made of a network: the layers of an engine, from the builder's detailed log, and what they must be.

The engine itself cannot be asked on a machine without a GPU. Every layer names the ONNX nodes that it computes.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["attention", "matmul", "convolution"]

HEAD = re.compile(
    r"Name: (?P<name>.+?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], (?:Constants|Outputs): \["
)
TENSOR = re.compile(r"\{ Name: [^,]+, Dimensions: \[(?P<dims>[\d,]*)\].*?Datatype: (?P<dtype>\w+)")
NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
SCRATCH = re.compile(r"Total Activation Memory: (\d+) bytes")
NAMES = {"BFloat16": "bf16", "Half": "fp16", "Float": "fp32", "FP8": "fp8"}  # the log's dtypes by ours
# How kernels are called: fused attention, and products and convolutions alone or with what follows them.
ATTENTION = re.compile(r"_mha_")
MATMUL = re.compile(r"^(gemm|matrix_?multiply)|_Fc[A-Z_]", re.IGNORECASE)
CONVOLUTION = re.compile(r"^(correlation|\w*convolution)|_Corr[A-Z_]", re.IGNORECASE)


@dataclass(frozen=True)
class Layer:
    """One kernel of an engine: dtypes of what it reads and writes, and the ONNX nodes it computes (a part of)."""

    name: str
    type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Wanted:
    """A node of the network that the engine must have as one kernel: what it is, and the dtype it computes in."""

    node: str
    kind: Kind
    dtype: str


def read_layers(log: Iterable[str]) -> list[Layer]:
    """The layers that the builder's messages list, in the order they run."""
    return [layer for message in log for line in message.splitlines() if (layer := _read_layer(line)) is not None]


def read_scratch(log: Iterable[str]) -> int | None:
    """Bytes of memory that the engine needs while it runs, beside its inputs, outputs and weights."""
    found = [int(match[1]) for message in log for match in SCRATCH.finditer(message)]
    return found[-1] if found else None


def summarise(layers: Sequence[Layer]) -> dict[str, int]:
    """How many kernels of each kind, by the dtype of what they read: `attention bf16`, `matmul bf16`, `other`."""
    counts: Counter[str] = Counter()
    for layer in layers:
        kind = kind_of(layer)
        counts[f"{kind} {layer.inputs[0] if layer.inputs else 'none'}" if kind else "other"] += 1
    return dict(sorted(counts.items()))


def find_faults(layers: Sequence[Layer], wanted: Sequence[Wanted]) -> list[str]:
    """What is not as wanted: each fault as `NODE: got X, want Y`, none if all is."""
    computed: dict[str, list[Layer]] = {}
    for layer in layers:
        for node in layer.nodes:
            computed.setdefault(node, []).append(layer)
    faults = []
    for want in wanted:
        by = [layer for layer in computed.get(want.node, []) if kind_of(layer) == want.kind]
        if not by:
            got = ", ".join(sorted({layer.type for layer in computed.get(want.node, [])})) or "nothing"
            faults.append(f"{want.node}: got {got}, want one {want.kind} kernel")
        elif not all(want.dtype in layer.inputs for layer in by):  # what is fused to it may read other dtypes too
            got = ", ".join(sorted({dtype for layer in by for dtype in layer.inputs}))
            faults.append(f"{want.node}: got {want.kind} of {got}, want {want.dtype}")
    return faults


def kind_of(layer: Layer) -> Kind | None:
    """What a kernel is, by its type and name; None for all that is neither."""
    if ATTENTION.search(layer.name):
        return "attention"
    if MATMUL.search(layer.type) or MATMUL.search(layer.name):
        return "matmul"
    if CONVOLUTION.search(layer.type) or CONVOLUTION.search(layer.name):
        return "convolution"
    return None


def _read_layer(line: str) -> Layer | None:
    head = HEAD.match(line)
    if head is None:
        return None
    outputs = line[line.rfind("Outputs: [") :]
    return Layer(head["name"], head["type"], _dtypes(head["inputs"]), _dtypes(outputs), tuple(NODE.findall(line)))


def _dtypes(text: str) -> tuple[str, ...]:
    return tuple(NAMES.get(tensor["dtype"], tensor["dtype"].lower()) for tensor in TENSOR.finditer(text))
