"""The Inductor backend: one AOTInductor package (.pt2) a graph, machine code for this kind of CPU with its weights."""

import hashlib
import json
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.errors import BundleError
from ..engine.graphs import Graph
from ..engine.manifest import Precision
from ..engine.spec import Executable, Feed, GraphSpec, TensorSpec, check_feed


def precisions(device: torch.device) -> tuple[Precision, ...]:
    """bf16 before fp32 on the CPU; other devices have no packages yet."""
    return ("bf16", "fp32") if device.type == "cpu" else ()


def versions() -> dict[str, str]:
    return {"torch": str(torch.__version__)}


def arch(device: torch.device) -> str:
    """The CPU as the compiler sees it: machine, vector width, and a hash of every instruction set it has."""
    if device.type != "cpu":
        return f"sm{''.join(map(str, torch.cuda.get_device_capability(device)))}"
    has = sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True)
    digest = hashlib.sha256(json.dumps(has).encode()).hexdigest()[:8]
    return f"cpu-{platform.machine()}-{torch.backends.cpu.get_cpu_capability().lower()}-{digest}"


def memory_format(spec: GraphSpec, tensor: TensorSpec) -> torch.memory_format:
    """How a tensor lies in memory when a package reads it: that of a VAE has its channels last.

    A VAE is known by its caches. Its convolutions are much faster so, and caches need no conversion between calls.
    """
    convolves = any(output.name.startswith("cache_") for output in spec.outputs)
    return torch.channels_last_3d if convolves and len(tensor.shape) == 5 else torch.contiguous_format


class InductorExecutable:
    """One graph run from its package. Packages trust the layout of what they are fed, so it is made right here."""

    def __init__(self, spec: GraphSpec, file: Path) -> None:
        self.spec = spec
        self._formats = {tensor.name: memory_format(spec, tensor) for tensor in spec.inputs}
        try:
            stat = file.stat()
            self._package: Any = _loaded(str(file), (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns))
        except Exception as error:  # whatever the damaged file led to
            raise BundleError(
                f"{file}: got a package that does not load ({' '.join(str(error).split())[:200]}), want one; "
                "build the bundle again"
            ) from error

    def __call__(self, feed: Feed) -> dict[str, Tensor]:
        check_feed(self.spec, feed)
        if self._package is None:
            raise RuntimeError(f"{self.spec.name}: called after close()")
        inputs = [feed[tensor.name].contiguous(memory_format=self._formats[tensor.name]) for tensor in self.spec.inputs]
        with torch.inference_mode():
            outputs = self._package.run(inputs)
        return {tensor.name: output for tensor, output in zip(self.spec.outputs, outputs, strict=True)}

    def close(self) -> None:
        """Give the package back; the process keeps it mapped."""
        self._package = None


@cache
def _loaded(file: str, identity: tuple[int, ...]) -> Any:  # noqa: ARG001
    """The package in a file, loaded once in a process as long as the file is the same.

    The system never unloads its library: a thread-local string in what torch generates holds it until the thread ends.
    Each load would leave the code and the weights mapped once more, and the space of a deleted copy taken on the disk.
    The loader itself, as the function around it compiles small programs to see what the CPU can do, for a second and a
    half; here the bundle's architecture is compared before.
    """
    return torch._C._aoti.AOTIModelPackageLoader(file, "model", False, 1, -1)  # type: ignore[attr-defined]


def open_graph(graph: Graph, module: nn.Module | None, files: tuple[Path, ...], device: torch.device) -> Executable:  # noqa: ARG001
    """The executable of the graph's package."""
    return InductorExecutable(graph.spec, next(file for file in files if file.suffix == ".pt2"))
