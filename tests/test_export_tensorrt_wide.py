"""Blocks of the real models' widths, on small grids, built for two GPUs by TensorRT-RTX."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from swifti2v.engine.dit import DiT
from swifti2v.engine.graphs import profile_graphs
from swifti2v.engine.presets import get_profile
from swifti2v.engine.profile import Profile
from swifti2v.engine.vae import VAE
from swifti2v.export.job import Job
from swifti2v.export.onnx_file import write_onnx
from swifti2v.export.onnx_pieces import split_onnx
from swifti2v.export.tensorrt import run_process
from swifti2v.export.tensorrt_network import EngineJob

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
    onnx = write_onnx(Job(graph, module_of(profile, graph.weights), "", "bf16", CPU), tmp_path)
    kernels = build(name, onnx, tmp_path)
    assert {kind: kernels[kind] for kind in wanted} == wanted
    assert not any(kind.endswith("fp32") for kind in kernels if kind != "other")


def test_pieces_of_a_step_build(tmp_path: Path):
    """Cut in two, with the activations handed on in bf16."""
    profile = narrow()
    graph = profile_graphs(profile, torch.bfloat16)["stage2_next"]
    onnx = write_onnx(Job(graph, module_of(profile, "stage2"), "", "bf16", CPU), tmp_path)
    made = [build(f"piece{index}", piece, tmp_path) for index, piece in enumerate(split_onnx(onnx, 2))]
    assert sum(kernels.get("attention bf16", 0) for kernels in made) == 2


def build(name: str, onnx: Path, folder: Path) -> dict[str, int]:
    """What the kernels of the engine are."""
    engine, layers = folder / f"{name}.engine", folder / f"{name}.json"
    job = EngineJob("tensorrt_rtx", name, str(onnx), str(engine), str(layers), ("sm89", "sm120"), "bf16", "")
    process: subprocess.Popen[str]
    for process in run_process(job, folder):
        process.wait()
    assert engine.stat().st_size > 10_000
    return json.loads(layers.read_text())["summary"]
