"""The ONNX Runtime backend: one .onnx file a graph, run by the CPU provider."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.errors import BundleError, EnvironmentMismatch
from ..engine.graphs import Graph
from ..engine.manifest import Precision
from ..engine.spec import Executable, Feed, GraphSpec, check_feed
from .backend_names import output_names

PROVIDERS = ["CPUExecutionProvider"]


def precisions(device: torch.device) -> tuple[Precision, ...]:
    """fp32 on the CPU, whose provider has no bf16 kernels and computes fp16 in fp32."""
    return ("fp32",) if device.type == "cpu" else ()


def versions() -> dict[str, str]:
    return {"onnxruntime": require_onnxruntime().__version__}


def arch(device: torch.device) -> str:
    """The file holds operations, not machine code: any CPU will do."""
    return device.type


def require_onnxruntime() -> Any:
    """The package. EnvironmentMismatch where it is missing."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentMismatch(
            f"onnxruntime: got {error}, want it for bundles of that backend; run pip install 'swifti2v[onnx]'"
        ) from error
    return onnxruntime


class OnnxExecutable:
    """One graph run by ONNX Runtime. Feeds are read where they lie; outputs are new tensors."""

    def __init__(self, spec: GraphSpec, file: Path) -> None:
        ort = require_onnxruntime()
        self.spec = spec
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(str(file), options, providers=PROVIDERS)
        except Exception as error:  # onnxruntime's errors share no base of their own
            raise BundleError(
                f"{file}: got a file that ONNX Runtime refuses ({' '.join(str(error).split())[:200]}), want a graph; "
                "build the bundle again"
            ) from error
        _check_session(self._session, spec, file)
        self._outputs = output_names(spec)

    def __call__(self, feed: Feed) -> dict[str, Tensor]:
        check_feed(self.spec, feed)
        if self._session is None:
            raise RuntimeError(f"{self.spec.name}: called after close()")
        arrays = {name: tensor.detach().contiguous().numpy() for name, tensor in feed.items()}
        outputs = self._session.run(self._outputs, arrays)
        return {tensor.name: torch.from_numpy(array) for tensor, array in zip(self.spec.outputs, outputs, strict=True)}

    def close(self) -> None:
        self._session = None


def open_graph(graph: Graph, module: nn.Module | None, files: tuple[Path, ...], device: torch.device) -> Executable:  # noqa: ARG001
    """The executable of the graph's .onnx file."""
    return OnnxExecutable(graph.spec, next(file for file in files if file.suffix == ".onnx"))


def _check_session(session: Any, spec: GraphSpec, file: Path) -> None:
    """Refuse a session on other providers, or with other tensors, than were asked for."""
    if session.get_providers() != PROVIDERS:
        raise EnvironmentMismatch(
            f"ONNX Runtime providers: got {session.get_providers()}, want {PROVIDERS}; install onnxruntime again"
        )
    want = [(tensor.name, tensor.shape) for tensor in spec.inputs]
    want += [(name, tensor.shape) for name, tensor in zip(output_names(spec), spec.outputs, strict=True)]
    got = [(tensor.name, tuple(tensor.shape)) for tensor in (*session.get_inputs(), *session.get_outputs())]
    if got != want:
        different = [f"{g} for {w}" for g, w in zip(got, want, strict=False) if g != w] or [f"{len(got)} tensors"]
        raise BundleError(f"{file}: got {different[0]}, want {spec.name} as the profile has it; build the bundle again")
