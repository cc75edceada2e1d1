"""The backends that compile, one line each. runtime/backend_registry.py has those that run what they made."""

import subprocess
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..engine.errors import EnvironmentMismatch
from ..engine.manifest import Precision
from . import eager, inductor, onnxruntime, torch_tensorrt
from .job import Job
from .tensorrt import TensorRTBuilder, builder_memory, rtx_archs

Processes = Generator[subprocess.Popen[str], None, None]


@dataclass(frozen=True)
class Builder:
    """How a backend compiles a graph: `build` writes its artifacts, one or more files, to an empty folder.

    It may give the processes that do the work, one after another; it goes on when one has ended. `built_with` are the
    versions of packages that have a hand in artifacts and need not be there where they run.
    """

    build: Callable[[Job, Path], Processes | None]
    built_with: Callable[[], dict[str, str]]
    devices: tuple[str, ...] = ("cpu",)  # the kinds that artifacts are built for, the usual one first
    archs: Callable[[Sequence[str], str], tuple[str, ...]] | None = None  # checks those that it builds for from afar
    precisions: tuple[Precision, ...] = ()  # of a builder for other machines; else those the backend has here
    fp8: bool = False  # whether it also builds in that, whatever precisions the backend has beside it
    process_memory: Callable[[int], int] | None = None  # bytes of one process for bytes of weights


RTX, TENSORRT = TensorRTBuilder("tensorrt_rtx"), TensorRTBuilder("tensorrt")

BUILDERS = {
    "eager": Builder(eager.build, eager.built_with),
    "inductor": Builder(inductor.build, inductor.built_with, ("cpu", "cuda")),
    "onnxruntime": Builder(onnxruntime.build, onnxruntime.built_with),
    "tensorrt": Builder(TENSORRT.build, TENSORRT.built_with, ("cuda",), fp8=True, process_memory=builder_memory),
    "tensorrt-rtx": Builder(
        RTX.build,
        RTX.built_with,
        ("cuda",),
        rtx_archs,
        ("bf16", "fp16", "fp32"),
        fp8=True,
        process_memory=builder_memory,
    ),
    "torch-tensorrt": Builder(torch_tensorrt.build, torch_tensorrt.built_with, ("cuda",)),
}


def find_builder(name: str) -> Builder:
    """The builder of that name."""
    if name not in BUILDERS:
        raise EnvironmentMismatch(f"backend: got {name!r}, want one of {', '.join(BUILDERS)}; pick one")
    return BUILDERS[name]
