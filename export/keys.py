"""When a graph need not be compiled again: its key, the explicit list of all that decides its artifacts."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..engine.graphs import Graph
from ..engine.manifest import PRECISIONS
from ..engine.plain import to_plain
from ..runtime.backend_weights import Source
from .reads import read_names
from .target import Target

FOLDER = Path(__file__).resolve().parent
MODEL_CODE = "model code"  # among a target's versions


@dataclass(frozen=True)
class GraphKey:
    """The fields of a graph's key. Equal keys have equal artifacts, whoever built them and where.

    `weights` is of what the graph itself reads, as it is compiled: LoRAs merged, in the precision asked for. A change
    elsewhere in the model leaves it alone.
    """

    weights: str  # SHA-256 of the model's configuration and the tensors that the graph reads
    graph: str  # SHA-256 of the spec
    code: str  # SHA-256 of the sources that make modules out of weights, and artifacts out of modules
    backend: str
    compiler: dict[str, str]  # versions of every package that has a hand in artifacts
    arch: str
    precision: str

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all fields."""
        return _sha256(to_plain(self))


def graph_keys(graphs: Mapping[str, Graph], source: Source, target: Target) -> dict[str, GraphKey]:
    """The keys of these graphs, by name. Every tensor that one of them reads is hashed, once."""
    hashes = {name: _Hashes(module) for name, module in source.modules.items()}
    reads = read_names(source.profile, PRECISIONS[source.precision])
    code = _sha256([target.versions[MODEL_CODE], _builder_code()])
    versions = {name: version for name, version in target.versions.items() if name != MODEL_CODE}
    return {
        name: GraphKey(
            weights=hashes[graph.weights].of(reads[name]),
            graph=_sha256(to_plain(graph.spec)),
            code=code,
            backend=target.backend,
            compiler={**target.built_with, **versions},
            arch=target.arch,
            precision=source.precision,
        )
        for name, graph in graphs.items()
    }


class _Hashes:
    """What the tensors of a model are, each hashed when it is first asked for."""

    def __init__(self, module: nn.Module) -> None:
        self._config = repr(module.config)
        self._tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self._known: dict[str, str] = {}

    def of(self, read: Collection[str]) -> str:
        """Of the configuration, and of the tensors of every layer that a parameter is read of.

        Whole layers, because a quantised one holds scales that the model had not when it was watched. The model's own
        buffers, such as statistics of latents, belong to every graph.
        """
        layers = {"", *map(_layer, read)}
        names = sorted(name for name in self._tensors if _layer(name) in layers)
        return _sha256([self._config, [(name, self._tensor(name)) for name in names]])

    def _tensor(self, name: str) -> str:
        if name not in self._known:
            tensor = self._tensors[name].detach().cpu().contiguous()
            digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # [...] -> [bytes]
            self._known[name] = digest.hexdigest()
        return self._known[name]


def _layer(name: str) -> str:
    """The submodule that holds a tensor."""
    return name.rpartition(".")[0]


def _builder_code() -> str:
    """SHA-256 of this folder's sources, but for what talks to a terminal."""
    files = sorted(path for path in FOLDER.glob("*.py") if not path.name.startswith("cli"))
    return _sha256([(path.name, path.read_text(encoding="utf-8")) for path in files])


def _sha256(plain: object) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
