"""What the CUDA driver says by itself, so that a PyTorch that does not see a GPU can be told from a missing GPU."""

from importlib import import_module
from typing import Any

import torch

from ..engine.errors import EnvironmentMismatch


def cuda_runtime() -> Any:
    """The CUDA runtime API. EnvironmentMismatch where cuda-python is missing."""
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise EnvironmentMismatch(f"cuda-python: got {error}, want it; run pip install 'swifti2v[cuda]'") from error


def probe_driver() -> dict[str, Any]:
    """`driver`: its CUDA version, or why there is none; `devices`: name, architecture and memory of each; `note`.

    Asked through cuda.bindings, which needs neither a GPU nor a PyTorch built for one.
    """
    try:
        runtime = cuda_runtime()
    except EnvironmentMismatch as error:
        return {"driver": f"not asked: {error}", "devices": []}
    success = runtime.cudaError_t.cudaSuccess
    error, count = runtime.cudaGetDeviceCount()
    if error != success:
        return {"driver": f"none ({error.name})", "devices": []}
    _, version = runtime.cudaDriverGetVersion()
    devices = []
    for index in range(count):
        error, properties = runtime.cudaGetDeviceProperties(index)
        if error == success:
            name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
            sm = f"{properties.major}{properties.minor}"
            devices.append({"name": name, "sm": sm, "GB": round(properties.totalGlobalMem / 1e9, 1)})
    facts = {"driver": f"{version // 1000}.{version % 1000 // 10}", "devices": devices}
    note = mismatch(version, devices)
    return {**facts, "note": note} if note else facts


def mismatch(driver: int, devices: list[dict[str, Any]]) -> str | None:
    """Why PyTorch does not use a GPU that is there, with what to do. `driver` as CUDA counts: 13000 is 13.0."""
    if not devices or torch.cuda.is_available():
        return None
    built = torch.version.cuda
    if built is None:
        return "a GPU is here, but this PyTorch is a CPU build: install one for CUDA"
    if driver // 1000 < int(built.split(".")[0]):
        return f"a GPU is here, but its driver is older than CUDA {built}, which PyTorch wants: update the driver"
    return "a GPU is here, but PyTorch does not see it: check CUDA_VISIBLE_DEVICES and permissions"
