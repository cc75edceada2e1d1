"""The TensorRT backends: engines of `tensorrt` or `tensorrt_rtx`, one adapter for both.

Tensors are bound where they lie, work goes on the current stream, and all memory is PyTorch's: outputs are new tensors,
scratch memory goes back after the call. So the executables may be captured in a CUDA graph.
"""

import importlib
import mmap
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.errors import BundleError, EnvironmentMismatch, NumericsError
from ..engine.graphs import Graph
from ..engine.manifest import Precision
from ..engine.spec import Executable, Feed, GraphSpec, check_feed
from .backend_cache import keep_folder
from .backend_gpu import aligned, check_device, gpu_arch, gpu_index, gpu_precisions
from .backend_names import output_names
from .backend_parts import Kind, check_parts, run_parts

EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
DTYPES = {  # of all that a graph takes, gives, or hands from part to part
    "BF16": torch.bfloat16, "HALF": torch.float16, "FLOAT": torch.float32, "FP8": torch.float8_e4m3fn,
    "INT64": torch.int64, "INT32": torch.int32, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class TensorRTBackend:
    """The backend of one package; its methods are what the registry asks for."""

    package: str

    def precisions(self, device: torch.device) -> tuple[Precision, ...]:
        return gpu_precisions(device)

    def versions(self) -> dict[str, str]:
        return {self.package: require_tensorrt(self.package).__version__}

    def arch(self, device: torch.device) -> str:
        """The compute capability, such as sm89. EnvironmentMismatch where there is no GPU."""
        return gpu_arch(EXTRAS[self.package], device)

    def open_graph(
        self,
        graph: Graph,
        module: nn.Module | None,  # noqa: ARG002
        files: tuple[Path, ...],
        device: torch.device,
    ) -> Executable:
        """The executable of the graph's engines, several where it was built in pieces, in order of their numbers."""
        self.arch(device)
        engines = [file for file in files if file.suffix == ".engine"]
        engines.sort(key=lambda file: int(file.stem.removeprefix("model-")))  # as text, 100 would come before 11
        return TensorRTExecutable(require_tensorrt(self.package), graph.spec, engines, device)


def require_tensorrt(package: str) -> Any:
    """The package. EnvironmentMismatch where it is missing or does not load."""
    try:
        return importlib.import_module(package)
    except Exception as error:  # a missing library shows as any kind of error
        raise EnvironmentMismatch(
            f"{package}: got {' '.join(str(error).split())[:200]}, want it for bundles of that backend; "
            f"run pip install 'swifti2v[{EXTRAS[package]}]'"
        ) from error


def make_logger(trt: Any, note: Callable[[Any, str], None]) -> Any:
    """A logger that hands severity and text of every message on."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            note(severity, text)

    return Logger()


class Engine:
    """One deserialized engine: names in, names out, and a context without memory of its own."""

    def __init__(self, trt: Any, runtime: Any, file: Path, errors: list[str]) -> None:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            said = " ".join(errors[-1].split())[:200] if errors else "nothing said"
            raise BundleError(f"{file}: got an engine that does not load ({said}), want one; build the bundle again")
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        self.tensors: dict[str, Kind] = {
            name: (tuple(engine.get_tensor_shape(name)), DTYPES[engine.get_tensor_dtype(name).name]) for name in names
        }
        self.inputs = [name for name in names if modes[name] == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if modes[name] == trt.TensorIOMode.OUTPUT]
        self.scratch: int = engine.device_memory_size_v2
        self.cache: Any = None
        self.cache_file = keep_folder(file.parent.parent) / f"{file.parent.name}-{file.stem}.jit"
        self._runtime = runtime  # must outlive the engine
        self._engine: Any = engine
        self._context: Any = self._make_context(trt, engine)

    def _make_context(self, trt: Any, engine: Any) -> Any:
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(trt, "IRuntimeCache"):
            return engine.create_execution_context(strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # Its own CUDA graphs would be captured anew at every call, as outputs lie elsewhere each time.
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        self.cache = config.create_runtime_cache()
        if self.cache_file.is_file():
            self.cache.deserialize(self.cache_file.read_bytes())  # one of another GPU or version is refused by itself
        config.set_runtime_cache(self.cache)
        return engine.create_execution_context(config)

    def run(self, given: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> None:
        """Queue the engine on the current stream."""
        device = next(iter(made.values())).device
        scratch = torch.empty(max(self.scratch, 1), dtype=torch.uint8, device=device)  # free for others after the call
        self._context.set_device_memory(scratch.data_ptr(), self.scratch)
        for name, tensor in (*given.items(), *made.items()):
            self._context.set_tensor_address(name, tensor.data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream(device).cuda_stream):
            raise NumericsError(f"{self._engine.name}: got a refusal from TensorRT, want a run; see its log, report it")

    def close(self) -> None:
        """Keep what was compiled for this GPU, for the next start, and free all."""
        if self.cache is not None:
            blob = bytes(self.cache.serialize())
            with suppress(OSError):  # a bundle on a read-only disk starts slower, that is all
                self.cache_file.parent.mkdir(exist_ok=True)
                part = self.cache_file.with_name(f"{self.cache_file.name}.{secrets.token_hex(4)}.part")
                part.write_bytes(blob)
                part.replace(self.cache_file)
        self._context = self._engine = self._runtime = self.cache = None


class TensorRTExecutable:
    """One graph run by its engines, one after another."""

    def __init__(self, trt: Any, spec: GraphSpec, files: list[Path], device: torch.device) -> None:
        self.spec = spec
        self._device = gpu_index(device)
        self._outputs = output_names(spec)
        errors: list[str] = []
        logger = make_logger(trt, lambda severity, text: errors.append(text) if severity <= trt.ILogger.ERROR else None)
        with torch.cuda.device(self._device):
            runtime = trt.Runtime(logger)
            self._engines = [Engine(trt, runtime, file, errors) for file in files]
        wrong = check_parts(self._engines, spec, self._outputs)
        if wrong is not None:
            where = files[0].parent if files else "the bundle"
            raise BundleError(f"{where}: got {wrong} as the profile has it; build the bundle again")

    def __call__(self, feed: Feed) -> dict[str, Tensor]:
        check_feed(self.spec, feed)
        if not self._engines:
            raise RuntimeError(f"{self.spec.name}: called after close()")
        check_device(self.spec, feed, self._device)
        tensors = {name: aligned(tensor.contiguous()) for name, tensor in feed.items()}
        with torch.cuda.device(self._device):
            made = run_parts(self._engines, self.spec, tensors, self._outputs, self._device)
        return {tensor.name: made[name] for tensor, name in zip(self.spec.outputs, self._outputs, strict=True)}

    def close(self) -> None:
        for engine in self._engines:
            engine.close()
        self._engines = []
