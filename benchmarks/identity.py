"""What a measurement was made on: device, driver and clocks, versions, weights, commit."""

import hashlib
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..runtime.sidecar import versions
from .variants import Models

ROOT = Path(__file__).resolve().parent.parent
MORE_PACKAGES = ("triton", "diffusers", "onnxruntime", "tensorrt", "tensorrt_rtx")
SMI_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")


def identity(models: Models) -> dict[str, Any]:
    """Everything that two measurements must agree in to be compared, and what else may explain a difference."""
    device = models.device
    return {
        "device": describe_gpu(device) if device.type == "cuda" else describe_cpu(),
        "versions": versions() | _more_versions(),
        "weights": models.weights,
        "git": git_commit(),
    }


def describe_cpu() -> dict[str, Any]:
    """The CPU by name, with the threads that torch uses and how busy the machine is."""
    return {
        "kind": "cpu",
        "name": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_units": torch.cpu._is_amx_tile_supported(),
        "threads": torch.get_num_threads(),
        "cores": torch.multiprocessing.cpu_count(),
        "load_1min": _load(),
    }


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """The GPU by name; driver, clocks and power where nvidia-smi says them."""
    facts = torch.cuda.get_device_properties(device)
    return {
        "kind": "cuda",
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "memory_bytes": facts.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": _nvidia_smi(device.index or 0),
    }


def git_commit() -> str | None:
    """The commit of the source tree, with `+` where files differ from it; None for an installed package."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    head, changed = _output(["git", "rev-parse", "--short=12", "HEAD"]), _output(["git", "status", "--porcelain"])
    return None if head is None else head + ("+" if changed else "")


def code_digest() -> str:
    """Twelve hex digits of every source file that runs here, for trees without git."""
    digest = hashlib.sha256()
    for path in sorted(path for room in ("kernels", "engine", "runtime") for path in (ROOT / room).glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _load() -> float | None:
    try:
        return float(Path("/proc/loadavg").read_text().split()[0])
    except OSError:
        return None


def _more_versions() -> dict[str, str]:
    found = {"code": code_digest()}
    for name in MORE_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _nvidia_smi(index: int) -> dict[str, str] | None:
    text = _output(["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader"])
    values = [] if text is None else [value.strip() for value in text.split(",")]
    return dict(zip(SMI_FIELDS, values, strict=True)) if len(values) == len(SMI_FIELDS) else None


def _output(command: list[str]) -> str | None:
    """What a command prints, None where it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
