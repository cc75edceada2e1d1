"""Models with the kernels that a run would choose on this GPU, and captured steps, beside the plain ones."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..engine.graphs import Graph, profile_graphs
from ..engine.spec import Executable
from ..runtime.acceleration import Acceleration, check_acceleration
from ..runtime.backend_eager import EagerExecutable
from ..runtime.cuda_graphs import step_capture
from ..runtime.frame_copy import FrameCopier
from ..runtime.fused import give_kernels, measure_kernels, twin
from .models import Models
from .variants import SHORT, Graphs, OpenGraph, Variant, eager_variant


def accelerated_module(models: Models, name: str, dtype: torch.dtype, folder: Path | None) -> nn.Module:
    """The module of that weights name, which shares its weights with the plain one, with the kernels chosen here.

    What is measured is kept in `folder`, where there is one.
    """
    module = twin(models.module(name, dtype))
    give_kernels({name: module}, _measured(models, {name: module}, dtype, folder).kernels)
    return module


def fused_modules(models: Models, dtype: torch.dtype, folder: Path | None) -> OpenGraph:
    """How eager opens a graph on such modules, each made once."""
    kept: dict[str, nn.Module] = {}

    def open_graph(graph: Graph) -> Executable:
        if graph.weights not in kept:
            kept[graph.weights] = accelerated_module(models, graph.weights, dtype, folder)
        return EagerExecutable(graph, kept[graph.weights])

    return open_graph


def fused_variant(models: Models, dtype: torch.dtype, folder: Path | None, captured: bool = False) -> Variant:
    """PyTorch with the kernels chosen here, and with `captured` steps. EnvironmentMismatch without CUDA and Triton."""
    check_acceleration("fused", captured, models.device)
    capture = step_capture(models.device) if captured else None
    graphs = Graphs(profile_graphs(models.profile, dtype), fused_modules(models, dtype, folder), models.device, capture)
    copier = FrameCopier(models.device, _measured(models, {}, dtype, folder).kernels.to_bytes)
    name = f"fused_{SHORT[dtype]}{'_captured' if captured else ''}"
    return Variant(name, "eager", dtype, models.profile, graphs, copier=copier)


def captured_variant(models: Models, dtype: torch.dtype) -> Variant:
    """PyTorch as it is, its denoising steps captured. EnvironmentMismatch without CUDA."""
    plain = eager_variant(models, dtype, around=step_capture(models.device))
    return replace(plain, name=f"{plain.name}_captured")


def _measured(models: Models, modules: dict[str, nn.Module], dtype: torch.dtype, folder: Path | None) -> Acceleration:
    return measure_kernels(models.profile, modules, dtype, models.device, folder)
