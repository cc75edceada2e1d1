"""ONNX files: torch's dynamo export at opset 23, weights beside the graph, names those of the spec."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..engine.errors import EnvironmentMismatch
from ..runtime.backend_names import output_names
from .job import Job

OPSET = 23  # the first with Attention and RMSNormalization


def write_onnx(job: Job, folder: Path) -> Path:
    """Write model.onnx, and model.onnx.data with the weights; returns the former."""
    require_onnx()
    spec = job.graph.spec
    with torch.inference_mode(), _quiet():
        program = torch.onnx.export(
            job.module(),
            job.inputs(),
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=output_names(spec),
            verbose=False,
        )
    assert program is not None
    _strip(program.model)
    file = folder / "model.onnx"
    program.save(file, external_data=True)  # one file may not exceed 2 GB
    return file


def onnx_versions() -> dict[str, str]:
    """Packages that have a hand in the file."""
    onnx, onnxscript = require_onnx()
    return {"torch": str(torch.__version__), "onnx": onnx.__version__, "onnxscript": onnxscript.__version__}


def require_onnx() -> tuple[Any, Any]:
    """The packages onnx and onnxscript. EnvironmentMismatch where one is missing."""
    try:
        import onnx
        import onnxscript
    except ImportError as error:
        raise EnvironmentMismatch(
            f"onnx: got {error}, want onnx and onnxscript to export with; run pip install 'swifti2v[onnx]'"
        ) from error
    return onnx, onnxscript


def _strip(model: Any) -> None:
    """Drop what names this machine's files and differs from run to run: stack traces of every node."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on itself off stderr."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
