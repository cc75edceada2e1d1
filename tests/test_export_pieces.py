"""Graphs in pieces: cut where little is handed on, and computing what the whole does."""

import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from bundles import refused

from swifti2v.engine.errors import EnvironmentMismatch, SpecError
from swifti2v.engine.graphs import profile_graphs
from swifti2v.engine.presets import get_profile
from swifti2v.engine.spec import GraphSpec, check_feed
from swifti2v.export.job import Job
from swifti2v.export.memory import check_memory, free_memory
from swifti2v.export.onnx_file import write_onnx
from swifti2v.export.onnx_pieces import CACHES, PIECE, Cuts, choose_cuts, measure, piece_count, split_onnx
from swifti2v.export.parity import sample_feed
from swifti2v.runtime.backend_names import output_names
from swifti2v.runtime.backend_parts import check_parts, run_parts
from swifti2v.runtime.backend_weights import open_source

Wholes = dict[str, tuple[GraphSpec, Path]]
DTYPES = {"tensor(float)": torch.float32, "tensor(int64)": torch.int64, "tensor(bool)": torch.bool}


def test_a_cut_is_where_least_crosses_near_equal_loads():
    # by node:            0   1  2  3   4   5  6   7
    cuts = Cuts((10, 10, 10, 10, 10, 10, 10, 10), (0, 9, 9, 5, 9, 1, 9, 9))
    assert choose_cuts(cuts, 2) == [5]
    assert choose_cuts(cuts, 1) == []
    narrow_far_off = Cuts((10,) * 8, (0, 1, 9, 9, 5, 9, 9, 9))
    assert choose_cuts(narrow_far_off, 2) == [4]
    one_large_node = Cuts((1, 1, 90, 1, 1), (0, 9, 9, 9, 9))
    assert choose_cuts(one_large_node, 2) == [2]
    assert choose_cuts(Cuts((1, 1), (0, 9)), 4) == [1], "no more pieces than nodes"


def test_how_many_pieces():
    assert [piece_count(size, 0) for size in (0, 1, PIECE, PIECE + 1, 28 * 10**9)] == [1, 1, 1, 2, 14]
    assert [piece_count(PIECE // 2, size) for size in (CACHES, CACHES + 1)] == [1, 5]


def test_large_caches_are_made_in_pieces():
    """Of `wan-2k` those of the encoder and the decoder at full resolution, and of Stage I's decoder."""
    counts = {
        name: piece_count(0, graph.spec.donated_bytes)
        for name, graph in profile_graphs(get_profile("wan-2k"), torch.bfloat16).items()
    }
    several = {name: count for name, count in counts.items() if count > 1}
    assert several == {"motion_next": 5, "reference_next": 17, "decode_next": 52}


@dataclass
class OnnxPart:
    """A piece that ONNX Runtime computes, and the memory of all caches that were alive when it ran."""

    file: Path
    alive: list[weakref.ref[torch.Tensor]]  # what was ever fed or made, shared by all pieces

    def __post_init__(self) -> None:
        self.session = onnxruntime.InferenceSession(str(self.file))
        self.inputs = [tensor.name for tensor in self.session.get_inputs()]
        self.outputs = [tensor.name for tensor in self.session.get_outputs()]
        every = (*self.session.get_inputs(), *self.session.get_outputs())
        self.tensors = {tensor.name: (tuple(tensor.shape), DTYPES[tensor.type]) for tensor in every}
        self.caches = 0

    def run(self, given: Mapping[str, torch.Tensor], made: Mapping[str, torch.Tensor]) -> None:
        self.alive += [weakref.ref(tensor) for tensor in made.values()]
        there = [tensor for tensor in (known() for known in self.alive) if tensor is not None]
        self.caches = sum(t.untyped_storage().nbytes() for t in there if t.shape[2:3] == (2,))  # they have two frames
        values = self.session.run(list(made), {name: tensor.clone().numpy() for name, tensor in given.items()})
        for tensor, value in zip(made.values(), values, strict=True):
            tensor.copy_(torch.from_numpy(value))


def write_whole(name: str, folder: Path) -> tuple[GraphSpec, Path]:
    source = open_source(get_profile("tiny"))
    graph = profile_graphs(source.profile, torch.float32)[name]
    return graph.spec, write_onnx(Job(graph, source.modules[graph.weights], "", "fp32", source.device), folder)


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> Wholes:
    """Two graphs as one file each. The files stay as they are, and pieces lie beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swifti2v.engine.vae_layers.TOGETHER", 1)  # frame by frame, as large ones go
        return {name: write_whole(name, tmp_path_factory.mktemp(name)) for name in ("stage2_next", "decode_next")}


@pytest.mark.parametrize(("name", "count"), [("stage2_next", 3), ("decode_next", 8)])
def test_parts_compute_what_the_whole_does(name: str, count: int, wholes: Wholes):
    """One after another, and caches cost little more than their own memory, not twice it."""
    spec, whole = wholes[name]
    names, feed = output_names(spec), sample_feed(spec)
    session = onnxruntime.InferenceSession(str(whole))
    want = session.run(names, {tensor.name: feed[tensor.name].numpy() for tensor in session.get_inputs()})
    assert split_onnx(whole, 1) == [whole]
    given = {name: tensor.clone() for name, tensor in feed.items()}
    alive = [weakref.ref(tensor) for tensor in given.values()]
    parts = [OnnxPart(piece, alive) for piece in split_onnx(whole, count)]
    assert len(parts) == count
    assert check_parts(parts, spec, names) is None

    made = run_parts(parts, spec, dict(given), names, torch.device("cpu"))
    for output, value in zip(names, want, strict=True):
        assert np.array_equal(made[output].numpy(), np.asarray(value)), output
    for tensor in spec.inputs:
        if tensor.donated:
            assert given[tensor.name].untyped_storage().nbytes() == 0
        else:
            assert torch.equal(given[tensor.name], feed[tensor.name]), f"{tensor.name} is the caller's"
    if spec.donated_bytes:
        assert max(part.caches for part in parts) < 1.8 * spec.donated_bytes
        with pytest.raises(SpecError, match="cache_00: got a tensor that was donated to an earlier call and freed"):
            check_feed(spec, given)


def test_memory_that_others_see_is_not_freed(wholes: Wholes):
    spec, whole = wholes["decode_next"]
    given = sample_feed(spec)
    shared = torch.stack([given["cache_01"], given["cache_01"]])
    array = given["cache_02"].numpy()
    kept = array.copy()
    run_parts([OnnxPart(whole, [])], spec, given | {"cache_01": shared[0]}, output_names(spec), torch.device("cpu"))
    assert torch.equal(shared[0], shared[1])
    assert np.array_equal(array, kept)


def test_parts_that_do_not_fit_the_graph_are_named(wholes: Wholes):
    spec, whole = wholes["decode_next"]
    parts = [OnnxPart(piece, []) for piece in split_onnx(whole, 2)]
    names = output_names(spec)
    assert re.fullmatch(r"\w+ None, want \(\(.*float32\)", check_parts(parts[:1], spec, names) or "")
    assert (check_parts(parts[1:], spec, names) or "").startswith("latents None, want")
    narrow = profile_graphs(get_profile("tiny"), torch.bfloat16)["decode_next"].spec
    assert re.fullmatch(r"latents \(.*float32\), want \(.*bfloat16\)", check_parts(parts, narrow, names) or "")


def test_a_transformer_is_cut_between_layers(tmp_path: Path):
    spec, whole = write_whole("stage1_step", tmp_path)
    model = onnx.load(whole, load_external_data=False)
    cuts = measure(onnx, model)
    (cut,) = choose_cuts(cuts, 2)
    _, rows, cos, *_ = spec.inputs
    tokens = cos.shape[0] * get_profile("tiny").stage1.dit.dim
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
