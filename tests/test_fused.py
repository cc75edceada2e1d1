"""A profile's DiTs run by a set of kernels: every attention goes through it, and none that is not in the list."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swifti2v.engine.errors import EnvironmentMismatch
from swifti2v.engine.graphs import profile_graphs
from swifti2v.engine.profile import Profile
from swifti2v.export.parity import sample_feed
from swifti2v.kernels.dispatch import Choice, ChoiceTable, Shape, Timing
from swifti2v.kernels.kernel_set import EAGER, shape_of
from swifti2v.runtime.fused import TABLE, attention_shapes, give_kernels, read_table, use_fused


def test_every_attention_of_a_profile_is_listed(tiny: Profile, make_modules):
    tiny = replace(tiny, stage1=replace(tiny.stage1, dit=replace(tiny.stage1.dit, image_dim=12, image_tokens=5)))
    modules, seen = make_modules(tiny), set()

    def attend(q: Tensor, k: Tensor, v: Tensor, context_k: Tensor | None = None, context_v: Tensor | None = None):
        seen.add(shape_of(q, k, context_k))
        return EAGER.attend(q, k, v, context_k, context_v)

    give_kernels(modules, replace(EAGER, attend=attend))
    for name, graph in profile_graphs(tiny, torch.float32).items():
        if name in ("stage1_step", "stage2_first", "stage2_next"):
            feed = sample_feed(graph.spec)
            with torch.inference_mode():
                graph.build(modules[graph.weights], False)(*(feed[tensor.name] for tensor in graph.spec.inputs))
    assert seen == set(attention_shapes(tiny, torch.float32))


def test_a_table_comes_back_from_its_file(tmp_path: Path):
    shape = Shape(1, 2, 10, 12, 0, 64, "bf16")
    table = ChoiceTable((Choice(shape, "some GPU", {"torch": "2"}, (Timing("sdpa", (1.0, 2.0), 1e-3),)),))
    from swifti2v.runtime.sidecar import write_json

    write_json(tmp_path / TABLE, {"choices": table.to_plain()})
    assert read_table(tmp_path / TABLE) == table
    (tmp_path / TABLE).write_text("{}")
    assert read_table(tmp_path / TABLE) == read_table(tmp_path / "none") == ChoiceTable()


def test_without_a_gpu_it_is_refused(tiny: Profile, make_modules, tmp_path: Path):
    with pytest.raises(EnvironmentMismatch, match="fused kernels: got cpu"):
        use_fused(tiny, make_modules(tiny), torch.device("cpu"), torch.bfloat16, tmp_path)
