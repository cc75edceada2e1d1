"""TensorRT and TensorRT-RTX engines: an ONNX file, built to engines by processes of their own.

`tensorrt` builds for the GPU that is here; `tensorrt_rtx` needs none, and one engine may serve several kinds.
"""

import json
import subprocess
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..engine import errors
from ..engine.dit import DiT
from ..engine.errors import EnvironmentMismatch, ProfileError, SpecError, SwiftError
from ..engine.graphs import StepGraph
from ..engine.manifest import Precision, write_text
from ..engine.plain import to_plain
from .failure import CompileError
from .fp8 import SCALES, input_scales
from .job import Job
from .memory import check_memory
from .onnx_file import onnx_versions, write_onnx
from .onnx_pieces import piece_count, piece_weights, split_onnx
from .tensorrt_network import EngineJob

RTX_ARCHS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
FIRST_ARCH = {"bf16": 80, "fp8": 89}  # the compute capability that has it first


@dataclass(frozen=True)
class TensorRTBuilder:
    """The builder of one package."""

    package: str

    def build(self, job: Job, folder: Path) -> Generator[subprocess.Popen[str], None, None]:
        """Write model-NN.engine, and model-NN.json with its layers; gives every process while it is at work.

        Beside a step in fp8 lies scales.json: the scale of every quantised layer's input.
        """
        folder = folder.resolve()  # the process starts elsewhere
        scales = input_scales(job.weights)
        if job.precision == "fp8" and isinstance(job.weights, DiT) and not scales:
            raise SpecError(f"{job.graph.spec.name}: got a DiT in bf16, want one in fp8; call quantise_source first")
        onnx = write_onnx(job, folder)
        weights = sum(file.stat().st_size for file in folder.iterdir())
        pieces = piece_count(weights, job.graph.spec.donated_bytes)
        for index, piece in enumerate(split_onnx(onnx, pieces)):
            check_memory(job.graph.spec.name, builder_memory(piece_weights(weights)))
            yield from run_process(self._engine_job(job, folder / f"model-{index:02d}.engine", piece), folder)
        for file in (*folder.glob("*.onnx"), *folder.glob("*.onnx.data")):
            file.unlink()
        if scales and isinstance(job.module(), StepGraph):
            write_text(folder / SCALES, json.dumps(scales, indent=1) + "\n")

    def _engine_job(self, job: Job, engine: Path, onnx: Path) -> EngineJob:
        timing = ""
        if self.package == "tensorrt" and job.keep is not None:  # the other one times nothing
            job.keep.mkdir(exist_ok=True)
            timing = str(job.keep.resolve() / f"{self.package}-{','.join(job.archs)}.timing")
        tables = job.graph.spec.outputs[0].dtype == torch.float32  # computed in fp32, whatever the rest is
        precision: Precision = "fp32" if tables else job.precision
        layers = str(engine.with_suffix(".json"))
        return EngineJob(
            self.package, job.graph.spec.name, str(onnx), str(engine), layers, job.archs, precision, timing
        )

    def built_with(self) -> dict[str, str]:
        """Packages that have a hand in the engine, and need not be there where it runs."""
        return onnx_versions()


def builder_memory(weights: int) -> int:
    """Bytes that a process needs to build an engine with that many bytes of weights, as measured."""
    return 800_000_000 + 3 * weights


def run_process(job: EngineJob, folder: Path) -> Generator[subprocess.Popen[str], None, None]:
    """Build one engine in a fresh process. Gives it once, for the caller to wait; raises what it refused with."""
    said = folder / "process.log"
    with said.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            # Started in our own folder: Python looks for modules where it starts.
            [sys.executable, "-m", f"{__package__}.cli_tensorrt"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder,
        )  # fmt: skip
        try:
            assert process.stdin is not None
            with process.stdin:
                process.stdin.write(json.dumps(to_plain(job)))
            yield process
            process.wait()
            assert process.stdout is not None
            reply = process.stdout.read()
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise _process_error(job, process.returncode, reply, said.read_text(encoding="utf-8", errors="replace"))
    said.unlink()


def rtx_archs(archs: Sequence[str], precision: str) -> tuple[str, ...]:
    """The architectures in order, each once. EnvironmentMismatch for what TensorRT-RTX does not compile for."""
    for arch in archs:
        if arch in ("sm87", "sm90", "sm100", "sm103"):
            raise EnvironmentMismatch(
                f"arch: got {arch}, want some of {', '.join(RTX_ARCHS)}, as TensorRT-RTX is for GeForce and RTX GPUs "
                f"and leaves out Hopper and other data centre GPUs; build for {arch} with --backend tensorrt there"
            )
        if arch not in RTX_ARCHS:
            raise ProfileError(f"arch: got {arch!r}, want some of {', '.join(RTX_ARCHS)}; correct --arch")
        check_precision(arch, precision)
    return tuple(sorted(set(archs), key=lambda arch: int(arch[2:])))


def check_precision(arch: str, precision: str) -> None:
    """EnvironmentMismatch for a GPU that does not compute in the precision."""
    first = FIRST_ARCH.get(precision, 0)
    if arch.startswith("sm") and int(arch[2:]) < first:
        raise EnvironmentMismatch(
            f"arch: got {arch} for {precision}, want sm{first} or later, the first that computes in it; "
            "leave it out of --arch, or pass another --precision"
        )


def _process_error(job: EngineJob, code: int, reply: str, log: str) -> SwiftError:
    """What the process refused with, or how it ended."""
    try:
        plain = json.loads(reply.strip().splitlines()[-1])
        kind = CompileError if plain["kind"] == CompileError.__name__ else getattr(errors, plain["kind"])
        return kind(plain["error"])
    except (ValueError, LookupError, AttributeError):
        last = (log.strip().splitlines() or ["it said nothing"])[-1][:300]
        killed = "was killed, perhaps for want of memory" if code == -9 else f"ended with exit code {code}"
        return CompileError(
            f"{job.name}: got a builder that {killed} ({last}), want an engine; lower --jobs, or report it"
        )
