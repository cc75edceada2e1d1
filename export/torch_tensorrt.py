"""Torch-TensorRT: torch.export programs straight to an engine, without ONNX. runtime/backend_tensorrt.py runs it.

Written after its documentation; it could not be run where it was written.
"""

import importlib
from pathlib import Path
from typing import Any

import torch

from ..engine.errors import EnvironmentMismatch
from ..runtime.backend_names import output_names
from .job import Job


def build(job: Job, folder: Path) -> None:
    """Write model-00.engine, for the GPU that is here."""
    torch_tensorrt = require_torch_tensorrt()
    spec = job.graph.spec
    inputs = tuple(tensor.cuda() for tensor in job.inputs())
    module = job.module().cuda()
    try:
        with torch.inference_mode():
            program = torch.export.export(module, inputs, strict=False)
        engine = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
            program,
            arg_inputs=list(inputs),
            arg_input_binding_names=[tensor.name for tensor in spec.inputs],
            output_binding_names=tuple(output_names(spec)),
            use_explicit_typing=True,
            disable_tf32=True,  # fp32 means fp32
        )
    finally:
        module.to(job.device)
    (folder / "model-00.engine").write_bytes(engine)


def built_with() -> dict[str, str]:
    """Packages that have a hand in the engine, and need not be there where it runs."""
    return {"torch": str(torch.__version__), "torch_tensorrt": require_torch_tensorrt().__version__}


def require_torch_tensorrt() -> Any:
    """The package. EnvironmentMismatch where it is missing or does not load, as without CUDA."""
    try:
        return importlib.import_module("torch_tensorrt")
    except Exception as error:  # what it does not find shows as any kind of error
        raise EnvironmentMismatch(
            f"torch_tensorrt: got {' '.join(str(error).split())[:200]}, want it to compile with; "
            "run pip install 'swifti2v[torch-tensorrt]' beside a PyTorch for CUDA"
        ) from error
