"""Graphs in pieces: cut where little is handed on, and computing what the whole does."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from bundles import refused

from swifti2v.engine.errors import EnvironmentMismatch
from swifti2v.engine.graphs import profile_graphs
from swifti2v.engine.presets import get_profile
from swifti2v.export.job import Job
from swifti2v.export.memory import check_memory, free_memory
from swifti2v.export.onnx_file import write_onnx
from swifti2v.export.onnx_pieces import PIECE, Cuts, choose_cuts, measure, piece_count, split_onnx
from swifti2v.export.parity import sample_feed
from swifti2v.runtime.backend_names import output_names
from swifti2v.runtime.backend_weights import open_source


def test_a_cut_is_where_least_crosses_near_equal_weights():
    # by node:            0   1  2  3   4   5  6   7
    cuts = Cuts((10, 10, 10, 10, 10, 10, 10, 10), (0, 9, 9, 5, 9, 1, 9, 9))
    assert choose_cuts(cuts, 2) == [5]
    assert choose_cuts(cuts, 1) == []
    narrow_far_off = Cuts((10,) * 8, (0, 1, 9, 9, 5, 9, 9, 9))
    assert choose_cuts(narrow_far_off, 2) == [4]


def test_how_many_pieces():
    assert [piece_count(size) for size in (0, 1, PIECE, PIECE + 1, 28 * 10**9)] == [1, 1, 1, 2, 14]


def run(file: Path, names: list[str], pool: dict[str, Any]) -> list[Any]:
    session = onnxruntime.InferenceSession(str(file))
    return list(session.run(names, {tensor.name: pool[tensor.name] for tensor in session.get_inputs()}))


@pytest.mark.parametrize(
    ("name", "count"), [("stage2_next", 3), pytest.param("decode_next", 2, marks=pytest.mark.slow)]
)
def test_pieces_compute_what_the_whole_does(name: str, count: int, tmp_path: Path):
    source = open_source(get_profile("tiny"))
    graph = profile_graphs(source.profile, torch.float32)[name]
    whole = write_onnx(Job(graph, source.modules[graph.weights], "", "fp32", source.device), tmp_path)
    assert split_onnx(whole, 1) == [whole]
    feed = {key: tensor.numpy() for key, tensor in sample_feed(graph.spec).items()}
    names = output_names(graph.spec)
    want = run(whole, names, feed)
    pool = dict(feed)
    pieces = split_onnx(whole, count)
    assert len(pieces) == count
    for piece in pieces:
        made = [tensor.name for tensor in onnx.load(piece, load_external_data=False).graph.output]
        pool |= dict(zip(made, run(piece, made, pool), strict=True))
    assert all(np.array_equal(pool[key], value) for key, value in zip(names, want, strict=True))


def test_a_transformer_is_cut_between_layers(tmp_path: Path):
    source = open_source(get_profile("tiny"))
    graph = profile_graphs(source.profile, torch.float32)["stage1_step"]
    whole = write_onnx(Job(graph, source.modules["stage1"], "", "fp32", source.device), tmp_path)
    model = onnx.load(whole, load_external_data=False)
    cuts = measure(onnx, model)
    (cut,) = choose_cuts(cuts, 2)
    _, rows, cos, *_ = graph.spec.inputs
    tokens = cos.shape[0] * source.profile.stage1.dit.dim
    assert cuts.crossing[cut] == 4 * tokens + rows.bytes, "activations, and which row of the tables a block uses"
    assert model.graph.node[cut].name == "node_select_3", "the rows of the second layer are what comes next"


def test_a_build_that_does_not_fit_is_refused(tmp_path: Path):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       24000000 kB\nMemAvailable:    8000000 kB\n")
    assert free_memory(file) == 8_000_000 * 1024
    check_memory("stage2_next", 8 * 10**9, file)
    words = ["memory for stage2_next: got 8.2 GB free", "want about 10.0 GB", "--jobs"]
    refused(lambda: check_memory("stage2_next", 10 * 10**9, file), *words, kind=EnvironmentMismatch)
    assert free_memory(tmp_path / "none") is None
    check_memory("stage2_next", 10**15, tmp_path / "none")
