"""At full size: every graph of `wan-2k` becomes a torch.export program on meta tensors, with what its spec says."""

import pytest
import torch
from torch import nn

from swifti2v.engine.dit import DiT
from swifti2v.engine.graphs import profile_graphs
from swifti2v.engine.presets import get_profile
from swifti2v.engine.vae import VAE

PROFILE = get_profile("wan-2k")
GRAPHS = profile_graphs(PROFILE, torch.bfloat16)
KINDS = {
    "stage1": lambda: DiT(PROFILE.stage1.dit),
    "stage2": lambda: DiT(PROFILE.stage2.dit),
    "vae1": lambda: VAE(PROFILE.stage1.vae),
    "vae2": lambda: VAE(PROFILE.stage2.vae),
}


def meta_module(kind: str) -> nn.Module:
    with torch.device("meta"):
        module = KINDS[kind]().requires_grad_(False).eval()
    for parameter in module.parameters():  # buffers stay fp32
        parameter.data = parameter.data.to(torch.bfloat16)
    return module


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if GRAPHS[n].weights.startswith("stage") else []) for n in GRAPHS]
)
def test_every_graph_exports_at_2k(name: str):
    graph = GRAPHS[name]
    inputs = tuple(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in graph.spec.inputs)
    with torch.no_grad():
        program = torch.export.export(graph.build(meta_module(graph.weights), False), inputs, strict=False)
    output = next(node for node in program.graph.nodes if node.op == "output")
    made = [node.meta["val"] for node in output.args[0]]
    assert [(tuple(value.shape), value.dtype) for value in made] == [(t.shape, t.dtype) for t in graph.spec.outputs]
    # static means static: nothing in it asks for a value, or has a size that is only known when it runs
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [n for n in names if n.startswith(("aten.item", "aten.sym_", "aten.nonzero", "aten._local_scalar"))]
