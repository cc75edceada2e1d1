"""Models with the kernels that a run would choose on this GPU, beside the plain ones that they are timed against."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..engine.graphs import Graph, profile_graphs
from ..engine.spec import Executable
from ..runtime.acceleration import check_acceleration
from ..runtime.backend_eager import EagerExecutable
from ..runtime.fused import give_kernels, measure_kernels, twin
from .models import Models
from .variants import SHORT, Graphs, Variant


def accelerated_module(models: Models, name: str, dtype: torch.dtype, folder: Path | None = None) -> nn.Module:
    """The module of that weights name, which shares its weights with the plain one, with the kernels chosen here.

    What is measured is kept in `folder`, where there is one.
    """
    module = twin(models.module(name, dtype))
    chosen = measure_kernels(models.profile, {name: module}, dtype, models.device, folder)
    give_kernels({name: module}, chosen.kernels)
    return module


def fused_modules(models: Models, dtype: torch.dtype, folder: Path | None = None) -> Callable[[Graph], Executable]:
    """How eager opens a graph on such modules, each made once."""
    kept: dict[str, nn.Module] = {}

    def open_graph(graph: Graph) -> Executable:
        if graph.weights not in kept:
            kept[graph.weights] = accelerated_module(models, graph.weights, dtype, folder)
        return EagerExecutable(graph, kept[graph.weights])

    return open_graph


def fused_variant(models: Models, dtype: torch.dtype, folder: Path | None = None) -> Variant:
    """PyTorch with the kernels chosen here. EnvironmentMismatch without a CUDA device and Triton."""
    check_acceleration("fused", False, models.device)
    graphs = Graphs(profile_graphs(models.profile, dtype), fused_modules(models, dtype, folder), models.device)
    return Variant(f"fused_{SHORT[dtype]}", "eager", dtype, models.profile, graphs)
