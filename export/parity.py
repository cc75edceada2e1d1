"""Feeds made from a spec, and how far a compiled graph is from eager on them."""

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..engine.errors import NumericsError
from ..engine.graphs import Graph
from ..engine.manifest import Precision
from ..engine.sampler import TIMESTEPS
from ..engine.spec import Executable, GraphSpec, TensorSpec

LIMIT = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3, "fp8": 5e-2}  # the largest relative error that needs no second look


def sample_feed(spec: GraphSpec, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """A feed of plausible values for a spec, the same every time."""
    generator = torch.Generator().manual_seed(seed)
    return {tensor.name: _sample(tensor, generator).to(device) for tensor in spec.inputs}


def _sample(tensor: TensorSpec, generator: torch.Generator) -> Tensor:
    shape = tensor.shape
    if tensor.dtype == torch.int64:  # rows of a table of two
        return torch.randint(0, 2, shape, generator=generator)
    if tensor.dtype == torch.bool:  # every query sees something
        return torch.ones(shape, dtype=torch.bool).tril()
    if tensor.name == "timesteps":
        return TIMESTEPS * torch.rand(shape, generator=generator)
    return torch.randn(shape, generator=generator).to(tensor.dtype)


def parity_error(
    executable: Executable, graph: Graph, weights: nn.Module, precision: Precision, device: torch.device | str = "cpu"
) -> float:
    """The largest relative error (in L2, of one output) of an executable against eager in the same precision.

    NumericsError for outputs that are not finite or not as the spec says, and for an error that is not rounding: more
    than the limit, and in 16 bits also more than one and a half times as far from fp32 as eager itself.
    """
    spec = graph.spec
    # A feed is made anew where it is wanted, as it may be written to: at 2K one takes 13 GB.
    eager = _run(graph, weights, sample_feed(spec, device))
    with torch.inference_mode():
        got = {name: tensor.cpu() for name, tensor in executable(sample_feed(spec, device)).items()}
    for tensor in spec.outputs:
        value = got[tensor.name]
        if tuple(value.shape) != tensor.shape or value.dtype != tensor.dtype or not bool(torch.isfinite(value).all()):
            raise NumericsError(
                f"{spec.name}.{tensor.name}: got {tuple(value.shape)} {value.dtype}, "
                f"want finite {tensor.shape} {tensor.dtype}; report it"
            )
    error = _distance(got, eager)
    if not error <= LIMIT[precision] and not _is_rounding(got, eager, graph, weights, device):
        raise NumericsError(
            f"{spec.name}: got a relative error of {error:.1e} against eager, want at most {LIMIT[precision]:.0e} in "
            f"{precision}; report it, and use another backend or a wider --precision meanwhile"
        )
    return error


def _is_rounding(
    got: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    graph: Graph,
    weights: nn.Module,
    device: torch.device | str,
) -> bool:
    """Whether outputs are about as near as eager's to what fp32 gives. Asked rarely: it widens the weights."""
    exact = _run(graph, copy.deepcopy(weights).float(), _widened(sample_feed(graph.spec, device)))
    return _distance(got, exact) <= 1.5 * _distance(eager, exact)


def _run(graph: Graph, weights: nn.Module, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs, on the CPU. Donated inputs are used up."""
    # Convolutions in fp32 would use TF32 on a GPU, which compiled graphs do not.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        outputs = graph.build(weights, True)(*(feed[tensor.name] for tensor in graph.spec.inputs))
    return {tensor.name: output.cpu() for tensor, output in zip(graph.spec.outputs, outputs, strict=True)}


def _widened(feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in feed.items()}


def _distance(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """The largest relative L2 distance of a tensor; absolute for one that is zero."""
    errors = []
    for name, tensor in want.items():
        scale = tensor.double().norm()
        errors.append(float((got[name].double() - tensor.double()).norm() / (scale if scale > 0 else 1)))
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)
