"""Blocks of the real models' widths, on small grids, built for two GPUs by TensorRT-RTX."""

import json
import subprocess
from dataclasses import replace
from math import prod
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from swifti2v.engine.dit import DiT
from swifti2v.engine.graphs import profile_graphs
from swifti2v.engine.presets import get_profile
from swifti2v.engine.profile import Profile
from swifti2v.engine.spec import GraphSpec
from swifti2v.engine.vae import VAE
from swifti2v.export.job import Job
from swifti2v.export.onnx_file import write_onnx
from swifti2v.export.onnx_pieces import piece_count, split_onnx
from swifti2v.export.tensorrt import run_process
from swifti2v.export.tensorrt_network import EngineJob, build_engine
from swifti2v.runtime.backend_names import output_names

pytest.importorskip("tensorrt_rtx")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
CPU = torch.device("cpu")


def narrow() -> Profile:
    """`wan-2k` with one layer of each transformer, at 64x32 and 256x128 pixels."""
    profile = get_profile("wan-2k")
    stage1 = replace(profile.stage1, width=64, height=32, dit=replace(profile.stage1.dit, layers=1))
    stage2 = replace(profile.stage2, width=256, height=128, dit=replace(profile.stage2.dit, layers=1))
    return replace(profile, stage1=stage1, stage2=stage2)


def module_of(profile: Profile, kind: str) -> nn.Module:
    """Random bf16 weights, without the time and memory that usual initialisation takes."""
    stage = profile.stage1 if kind in ("stage1", "vae1") else profile.stage2
    with torch.device("meta"):
        module = (DiT(stage.dit) if kind.startswith("stage") else VAE(stage.vae)).requires_grad_(False).eval()
    for part in module.modules():
        for name, value in part.named_parameters(recurse=False):
            weight = torch.empty(value.shape, dtype=torch.bfloat16).normal_(std=0.02)
            part.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        for name, value in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, torch.ones(value.shape), persistent=False)
    return module


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("stage1_step", {"attention bf16": 3}),  # to itself, to the text, to image tokens
        ("stage2_next", {"attention bf16": 2}),
        ("image_next", {}),
        ("motion_next", {}),
        ("reference_next", {}),
        ("decode_next", {}),
    ],
)
def test_real_widths_build(name: str, wanted: dict[str, int], tmp_path: Path):
    """The process itself checks that attention is fused, products are in bf16, and Conv3d is convolution."""
    profile = narrow()
    graph = profile_graphs(profile, torch.bfloat16)[name]
    file = write_onnx(Job(graph, module_of(profile, graph.weights), "", "bf16", CPU), tmp_path)
    kernels = build(name, file, tmp_path)
    assert {kind: kernels[kind] for kind in wanted} == wanted
    assert not any(kind.endswith("fp32") for kind in kernels if kind != "other")


def test_pieces_of_a_step_build(tmp_path: Path):
    """Cut in two, with the activations handed on in bf16."""
    profile = narrow()
    graph = profile_graphs(profile, torch.bfloat16)["stage2_next"]
    file = write_onnx(Job(graph, module_of(profile, "stage2"), "", "bf16", CPU), tmp_path)
    made = [build(f"piece{index}", piece, tmp_path) for index, piece in enumerate(split_onnx(file, 2))]
    assert sum(kernels.get("attention bf16", 0) for kernels in made) == 2


def test_decoding_at_2k_fits_a_card_of_24_gb(tmp_path: Path):
    """Caches, activations between parts and scratch memory as the builder reports it: half of what one engine needs."""
    profile = get_profile("wan-2k")
    graph = profile_graphs(profile, torch.bfloat16)["decode_next"]
    whole = write_onnx(Job(graph, module_of(profile, "vae2"), "", "bf16", CPU), tmp_path)
    weights = (tmp_path / "model.onnx.data").stat().st_size
    pieces = split_onnx(whole, piece_count(weights, graph.spec.donated_bytes))
    peaks = {name: peak_memory(graph.spec, files, tmp_path) for name, files in (("one", [whole]), ("parts", pieces))}
    print({name: f"{peak / 1e9:.1f} GB" for name, peak in peaks.items()})
    assert peaks["parts"] < 24e9
    assert peaks["parts"] < 0.5 * peaks["one"]


def peak_memory(spec: GraphSpec, files: list[Path], folder: Path) -> int:
    """Bytes that are in use when most are, as runtime/backend_parts.py frees them; weights are left out."""
    named = set(output_names(spec))
    graphs = [onnx.load(file, load_external_data=False).graph for file in files]
    last = {info.name: index for index, graph in enumerate(graphs) for info in graph.input}
    alive, peak = {tensor.name: tensor.bytes for tensor in spec.inputs}, 0
    for index, (file, graph) in enumerate(zip(files, graphs, strict=True)):
        build_engine(
            EngineJob("tensorrt_rtx", file.stem, str(file), f"{folder}/e", f"{folder}/e.json", ("sm89",), "bf16", "")
        )
        for info in graph.output:
            kind = info.type.tensor_type
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
            alive[info.name] = dtype.itemsize * prod(axis.dim_value for axis in kind.shape.dim)
        peak = max(peak, sum(alive.values()) + json.loads((folder / "e.json").read_text())["scratch"])
        alive = {name: size for name, size in alive.items() if name in named or last.get(name, -1) > index}
    return peak


def build(name: str, file: Path, folder: Path) -> dict[str, int]:
    """What the kernels of the engine are."""
    engine, layers = folder / f"{name}.engine", folder / f"{name}.json"
    job = EngineJob("tensorrt_rtx", name, str(file), str(engine), str(layers), ("sm89", "sm120"), "bf16", "")
    process: subprocess.Popen[str]
    for process in run_process(job, folder):
        process.wait()
    assert engine.stat().st_size > 10_000
    return json.loads(layers.read_text())["summary"]
