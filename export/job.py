"""One graph to compile, as every builder gets it."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..engine.graphs import Graph
from ..engine.manifest import Precision
from ..runtime.backend_gpu import arch_device
from .parity import sample_feed


@dataclass(frozen=True)
class Job:
    """A graph, the weights it runs on, and what is wanted of the artifact."""

    graph: Graph
    weights: nn.Module
    sha256: str  # of the weights
    precision: Precision
    device: torch.device  # where the weights are
    archs: tuple[str, ...] = ()  # what to compile for, such as sm89; none for the weights' device
    keep: Path | None = None  # a folder for what makes later builds faster

    @property
    def target(self) -> torch.device:
        """The kind of device that artifacts run on."""
        return arch_device(self.archs[0]) if self.archs else self.device

    def module(self) -> nn.Module:
        """The eager module, which leaves donated inputs alone."""
        return self.graph.build(self.weights, False).eval()

    def inputs(self) -> tuple[Tensor, ...]:
        """Example inputs in the spec's order. Caches are only reserved, never written: at 2K they take 13 GB."""
        spec = self.graph.spec
        feed = sample_feed(replace(spec, inputs=tuple(t for t in spec.inputs if not t.donated)), self.device)
        empty = {t.name: torch.empty(t.shape, dtype=t.dtype, device=self.device) for t in spec.inputs if t.donated}
        return tuple((feed | empty)[tensor.name] for tensor in spec.inputs)
