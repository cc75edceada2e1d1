"""ONNX Runtime bundles: the ONNX file is the artifact."""

from pathlib import Path

from .job import Job
from .onnx_file import onnx_versions, write_onnx


def build(job: Job, folder: Path) -> None:
    """Write model.onnx, and model.onnx.data with the weights."""
    write_onnx(job, folder)


def built_with() -> dict[str, str]:
    """Packages that have a hand in the file, and need not be there where it runs."""
    return onnx_versions()
