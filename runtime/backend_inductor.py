"""The Inductor backend: one AOTInductor package (.pt2) a graph, machine code for one kind of CPU or GPU.

A package for the CPU holds its weights, packed for its code. One for a GPU has them beside it, as they are, and what
several graphs read is in the GPU's memory once.
"""

import hashlib
import json
import platform
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..engine.errors import BundleError, SwiftError
from ..engine.graphs import Graph
from ..engine.manifest import Precision
from ..engine.spec import Executable, Feed, GraphSpec, TensorSpec, check_feed
from .backend_gpu import aligned, check_device, gpu_arch, gpu_index, gpu_precisions

CPU = torch.device("cpu")
PACKAGE, WEIGHTS = "model.pt2", "weights.safetensors"


def precisions(device: torch.device) -> tuple[Precision, ...]:
    """The best first: bf16 before fp32 on the CPU."""
    return ("bf16", "fp32") if device.type == "cpu" else gpu_precisions(device)


def versions() -> dict[str, str]:
    return {"torch": str(torch.__version__)}


def arch(device: torch.device) -> str:
    """The GPU's compute capability; or the CPU as the compiler sees it: machine, vector width, and a hash of every
    instruction set it has."""
    if device.type != "cpu":
        return gpu_arch("inductor", device)
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
    """One graph run from its package. Packages trust the layout of what they are fed, so it is made right here.

    `weights` is the file of those that the package does not hold.
    """

    def __init__(self, spec: GraphSpec, file: Path, *, weights: Path | None = None, device: torch.device = CPU) -> None:
        self.spec = spec
        self._device = gpu_index(device) if device.type == "cuda" else device
        self._formats = {tensor.name: memory_format(spec, tensor) for tensor in spec.inputs}
        try:
            self._package: Any = load_package(file, self._device)
            self._weights = None if weights is None else shared_weights(weights, self._device)
            if self._weights is not None:
                tensors = {name: self._weights.tensors[name] for name in self._package.get_constant_fqns()}
                # Read where they lie, not copied.
                self._package.load_constants(tensors, use_inactive=False, check_full_update=True, user_managed=True)
        except SwiftError:
            raise
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
        outputs = self._run(inputs) if self._device.type == "cpu" else self._run_on_gpu(feed, inputs)
        return {tensor.name: output for tensor, output in zip(self.spec.outputs, outputs, strict=True)}

    def _run(self, inputs: list[Tensor]) -> list[Tensor]:
        with torch.inference_mode():
            return self._package.run(inputs)

    def _run_on_gpu(self, feed: Feed, inputs: list[Tensor]) -> list[Tensor]:
        """Queue the graph on the device's current stream, which is the one that a package asks for."""
        check_device(self.spec, feed, self._device)
        with torch.cuda.device(self._device):
            return self._run([aligned(tensor) for tensor in inputs])

    def close(self) -> None:
        """Give the package back; the process keeps it mapped. Weights that lie beside it go with their last graph."""
        self._package = self._weights = None


class SharedWeights:
    """The tensors of a file on a device, for every graph that reads them. Their memory is free when all are closed.

    A package keeps what it was given, for good: so it is the memory behind the tensors that goes.
    """

    def __init__(self, file: Path, device: torch.device) -> None:
        self.tensors = {name: tensor.to(device, copy=True) for name, tensor in load_file(file).items()}
        weakref.finalize(self, _free, list(self.tensors.values()), device).atexit = False


def shared_weights(file: Path, device: torch.device) -> SharedWeights:
    """The weights of a file, which are there already where another graph has the same file under another name."""
    key = (_identity(file), device)
    weights = _WEIGHTS.get(key)
    if weights is None:
        weights = _WEIGHTS[key] = SharedWeights(file, device)
    return weights


_WEIGHTS: weakref.WeakValueDictionary[tuple[Any, ...], SharedWeights] = weakref.WeakValueDictionary()


def _free(tensors: list[Tensor], device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # work that reads them may be queued
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)


def load_package(file: Path, device: torch.device) -> Any:
    """What torch makes of a package, for a device with its number where it is a GPU."""
    return _loaded(str(file), _identity(file), device)


def _identity(file: Path) -> tuple[int, ...]:
    stat = file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


@cache
def _loaded(file: str, identity: tuple[int, ...], device: torch.device) -> Any:  # noqa: ARG001
    """The package in a file, loaded once in a process as long as the file is the same.

    The system never unloads its library: a thread-local string in what torch generates holds it until the thread ends.
    Each load would leave the code and the weights mapped once more, and the space of a deleted copy taken on the disk.
    The loader itself, as the function around it compiles small programs to see what the CPU can do, for a second and a
    half; here the bundle's architecture is compared before.
    """
    # On a GPU without the lock around a call: it waits for the device, which a queued call must not.
    index, alone = (-1, False) if device.type == "cpu" else (device.index, True)
    return torch._C._aoti.AOTIModelPackageLoader(file, "model", alone, 1, index)  # type: ignore[attr-defined]


def open_graph(graph: Graph, module: nn.Module | None, files: tuple[Path, ...], device: torch.device) -> Executable:  # noqa: ARG001
    """The executable of the graph's package."""
    by_name = {file.name: file for file in files}
    if device.type == "cuda":
        arch(device)
    return InductorExecutable(graph.spec, by_name[PACKAGE], weights=by_name.get(WEIGHTS), device=device)
