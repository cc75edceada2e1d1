"""AOTInductor packages for a GPU: what is refused without one, how weights are shared, and, on one, that they run."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import build, change, command, refused
from torch._inductor import config as inductor_config

from swifti2v import Request, Session, get_profile, load_models
from swifti2v.engine.errors import EnvironmentMismatch, ProfileError, SpecError
from swifti2v.engine.graphs import profile_graphs
from swifti2v.engine.manifest import Precision
from swifti2v.export.build import build_bundle
from swifti2v.export.failure import CompileError
from swifti2v.export.inductor import FOR_CPU, FOR_GPU, compile_package, constant_names, save_weights
from swifti2v.export.job import Job
from swifti2v.export.parity import sample_feed
from swifti2v.export.target import make_target, pick_device, pick_precision
from swifti2v.runtime.backend_inductor import (
    PACKAGE,
    WEIGHTS,
    InductorExecutable,
    arch,
    load_package,
    open_graph,
    precisions,
)
from swifti2v.runtime.backend_registry import versions_here
from swifti2v.runtime.backend_weights import open_source
from swifti2v.runtime.bundle import load_bundle

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


@pytest.fixture
def a100(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch says that this machine has one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))


@no_gpu
@pytest.mark.parametrize("option", [("--device", "cuda"), ("--arch", "sm90"), ("--device", "cuda", "--dry-run")])
def test_without_a_gpu_the_command_says_so(tmp_path: Path, option: tuple[str, ...]):
    arguments = ["--profile", "tiny", "--backend", "inductor", *option, "-o", tmp_path / "b"]
    ran = command("swifti2v-export", *arguments, cache=tmp_path / "cache")
    assert (ran.returncode, ran.stderr.count("\n")) == (3, 1), ran.stderr
    assert "inductor on cuda: got " in ran.stderr
    assert "want an NVIDIA GPU" in ran.stderr
    assert not list(tmp_path.iterdir())


def test_a_backend_builds_for_the_devices_it_has():
    assert pick_device("inductor", None, []) == pick_device("inductor", "cpu", []) == CPU
    assert pick_device("inductor", "cuda", []) == pick_device("inductor", None, ["sm90"]) == CUDA
    assert pick_device("tensorrt", None, []) == pick_device("tensorrt-rtx", "cuda", ["sm89"]) == CUDA
    refused(lambda: pick_device("onnxruntime", "cuda", []), "cuda for onnxruntime", "want cpu", kind=ProfileError)
    refused(lambda: pick_device("tensorrt", "cpu", []), "cpu for tensorrt", "want cuda", kind=ProfileError)
    refused(lambda: pick_device("inductor", "cpu", ["sm90"]), "sm90 for cpu", kind=ProfileError)
    refused(lambda: pick_device("inductor", "cuda", [arch(CPU)]), "for cuda", kind=ProfileError)


def test_precisions_and_names_of_a_gpu(a100: None, monkeypatch: pytest.MonkeyPatch):
    assert (precisions(CUDA), arch(CUDA)) == (("bf16", "fp16", "fp32"), "sm80")
    assert pick_precision("inductor", None, CUDA) == "bf16"
    assert pick_precision("inductor", None, CPU) == "bf16"
    refused(lambda: pick_precision("inductor", "fp8", CUDA), "got fp8", kind=ProfileError)
    source = open_source(get_profile("tiny"), precision="bf16")
    assert make_target(source, "inductor", ["sm80"]).arch == "sm80"
    assert make_target(source, "inductor").arch.startswith("cpu-")
    refused(lambda: make_target(source, "inductor", ["sm90"]), "got sm90, want sm80", kind=EnvironmentMismatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert precisions(CUDA) == ("fp16", "fp32")
    refused(lambda: pick_precision("inductor", "bf16", CUDA), "got bf16", kind=ProfileError)


@pytest.fixture
def for_hopper(tmp_path: Path) -> Path:
    """A bundle that says it is one of packages for sm90; its files are never looked at."""
    folder = build(tmp_path / "b").folder
    change(folder, backend="inductor", arch="sm90", versions=versions_here("inductor"))
    return folder


def test_a_bundle_for_another_gpu_is_refused(for_hopper: Path, a100: None):
    text = refused(lambda: load_bundle(for_hopper), "arch: got a bundle for sm90, want one for sm80")
    assert text.endswith(f"--backend inductor --precision fp32 --arch sm80 -o {for_hopper}")


@no_gpu
def test_a_bundle_for_a_gpu_is_refused_without_one(for_hopper: Path, tmp_path: Path):
    refused(lambda: load_bundle(for_hopper), "inductor on cuda", kind=EnvironmentMismatch)
    refused(lambda: load_bundle(for_hopper, device="cpu"), "for sm90, want one for cpu-", kind=EnvironmentMismatch)
    ran = command("swifti2v-export", "verify", for_hopper, cache=tmp_path / "cache")
    assert (ran.returncode, ran.stderr.count("\n")) == (3, 1), ran.stderr
    graph = profile_graphs(get_profile("tiny"), torch.bfloat16)["stage2_text"]
    refused(lambda: open_graph(graph, None, (tmp_path / PACKAGE,), CUDA), "inductor on cuda", kind=EnvironmentMismatch)


def test_options_mean_to_torch_what_they_should():
    """Code on the CPU is for any of its family, where a GPU does the work, and for this one where it does it itself."""
    from torch._inductor import config, cpp_builder
    from torch._inductor.cpu_vec_isa import invalid_vec_isa, pick_vec_isa

    flags = getattr(cpp_builder, "_get_cpu_arch_cflags", lambda _: None)  # torch 2.11 has neither it nor cpp.march
    missing = {*FOR_CPU, *FOR_GPU} - config.get_config_copy().keys()
    assert missing == (set() if hasattr(cpp_builder, "_get_cpu_arch_cflags") else {"cpp.march"})
    with config.patch({name: value for name, value in FOR_GPU.items() if name not in missing}):
        assert not flags("g++")
        assert pick_vec_isa() is invalid_vec_isa
        assert not config.aot_inductor.package_constants_in_so
        assert not config.freezing
    with config.patch(FOR_CPU):
        assert flags("g++") != []
        assert config.aot_inductor.package_constants_in_so
        assert config.freezing


def test_a_package_is_opened_by_another_process(tmp_path: Path):
    """The smallest package whose weights are left out; on the CPU, where opening one works."""
    program = torch.export.export(torch.nn.Linear(16, 24), (torch.randn(2, 16),))
    known = {name: value for name, value in FOR_GPU.items() if name in inductor_config.get_config_copy()}
    file = tmp_path / PACKAGE
    torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=known)
    names = constant_names(file, CPU)
    assert names == sorted(load_package(file, CPU).get_constant_fqns()) == ["bias", "weight"]


def test_a_package_that_does_not_open_is_refused_in_one_line(tmp_path: Path):
    file, log = tmp_path / "stage2_text.work" / PACKAGE, tmp_path / "stage2_text.log"
    file.parent.mkdir()
    file.write_bytes(b"no package")
    refused(
        lambda: constant_names(file, CPU), "stage2_text: got a process that failed (RuntimeError: ", "not a ZIP",
        f"PyTorch {torch.__version__}", f"see {log}", "--backend tensorrt", kind=CompileError,
    )  # fmt: skip
    assert "Traceback" in log.read_text()
    dies = "import os, sys; print('before', flush=True); os.kill(os.getpid(), 11)"
    refused(
        lambda: constant_names(file, CPU, (sys.executable, "-X", "faulthandler", "-c", dies)),
        "stage2_text: got a process killed by signal 11 (Segmentation fault) where ", f"see {log}", kind=CompileError,
    )  # fmt: skip
    said = log.read_text()
    assert "before" in said
    assert "Fatal Python error" in said
    says = """print('a remark'); print('["b", "a"]')"""
    assert constant_names(file, CPU, (sys.executable, "-c", says)) == ["a", "b"]


@pytest.mark.slow
def test_weights_beside_packages_are_in_memory_once(tmp_path: Path):
    """Compiled as for a GPU, but on the CPU: what differs there is where the tensors lie."""
    source = open_source(get_profile("tiny"), precision="bf16")
    graph = profile_graphs(source.profile, torch.bfloat16)["stage2_text"]
    job, folder = Job(graph, source.modules["stage2"], "", "bf16", CPU), tmp_path / "stage2_text"
    folder.mkdir()
    save_weights(compile_package(job, folder, FOR_GPU, torch.export.default_decompositions()), folder, CPU)
    os.link(folder / WEIGHTS, tmp_path / WEIGHTS)  # as another graph of the bundle has them
    feed = sample_feed(graph.spec)
    with torch.inference_mode():
        want = job.module()(*feed.values())
    one, other = (
        InductorExecutable(graph.spec, folder / PACKAGE, weights=place / WEIGHTS) for place in (folder, tmp_path)
    )
    assert one._weights is not None
    assert one._weights is other._weights
    storages = [tensor.untyped_storage() for tensor in one._weights.tensors.values()]
    for run in (one, other):
        for got, wanted in zip(run(feed).values(), want, strict=True):
            torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
    one.close()
    kept = other(feed)
    before = {name: tensor.clone() for name, tensor in kept.items()}
    other.close()
    assert all(storage.nbytes() == 0 for storage in storages), "closing the last one frees them"
    assert all(torch.equal(kept[name], before[name]) for name in kept), "and leaves the caller's tensors alone"
    again = InductorExecutable(graph.spec, folder / PACKAGE, weights=folder / WEIGHTS)(feed)
    assert all(torch.equal(again[name], before[name]) for name in kept)


@pytest.fixture
def allocated() -> Iterator[None]:
    """Nothing of the test stays in the GPU's memory."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    yield
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2**20


@pytest.mark.parametrize(
    ("precision", "least"),
    [pytest.param("fp32", 40.0, marks=gpu), *(pytest.param(p, 20.0, marks=gpu) for p in ("bf16", "fp16"))],
)
def test_every_graph_and_a_whole_clip_on_a_gpu(precision: Precision, least: float, tmp_path: Path, allocated: None):
    profile = get_profile("tiny")
    made = build_bundle(open_source(profile, precision=precision), "inductor", tmp_path / "b", archs=[arch(CUDA)])
    assert all(record.parity is not None for record in made.manifest.graphs.values())
    first, following = (made.folder / f"stage2_{name}" / WEIGHTS for name in ("first", "next"))
    assert first.samefile(following), "once on the disk"
    image = np.random.default_rng(0).integers(0, 256, (profile.height, profile.width, 3), np.uint8)
    clips = []
    for opened in (load_models(profile, device="cuda", dtype=torch.float32), made.folder):
        with Session.open(opened) as session:
            chunks = session.generate(Request(image, "zoom", seed=3))
            clips.append(np.concatenate([chunk.frames for chunk in chunks]).astype(float))
    assert 10 * np.log10(255**2 / max(((clips[0] - clips[1]) ** 2).mean(), 1e-10)) > least


@pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in ("stage2_next", "motion_first")])
def test_calls_on_a_gpu_are_queued_and_outputs_the_callers(name: str, tmp_path: Path):
    source = open_source(get_profile("tiny"), precision="bf16")
    graph = profile_graphs(source.profile, torch.bfloat16)[name]
    made = build_bundle(source, "inductor", tmp_path / "b", [name], archs=[arch(CUDA)])
    run = open_graph(graph, None, made.files(name), CUDA)
    one, other = sample_feed(graph.spec, "cuda"), sample_feed(graph.spec, "cuda", seed=1)
    first = run(one)
    before = {key: tensor.clone() for key, tensor in first.items()}
    run(other)
    assert all(torch.equal(first[key], before[key]) for key in before)
    shifted = {key: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for key, t in one.items()}
    assert all(torch.equal(value, before[key]) for key, value in run(shifted).items()), "wherever a tensor begins"

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**9)  # about half a second, in which a call that waits would be seen
        queued = [run(one), run(one)]
        assert not stream.query(), "the call does not wait for the device"
    stream.synchronize()
    assert all(torch.equal(made[key], before[key]) for made in queued for key in before)
    refused(lambda: run(sample_feed(graph.spec)), "got a tensor on cpu", kind=SpecError)
    run.close()
    with pytest.raises(RuntimeError, match="after close"):
        run(one)
