"""AOTInductor packages: torch.export, attention in its fastest form, weights frozen into the code on a CPU.

On the one GPU tried, an H200 with PyTorch 2.11.0, they compile, and crash the process that opens them.
"""

import json
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch._inductor import config as inductor_config

from ..engine.errors import EnvironmentMismatch
from ..engine.manifest import write_text
from ..runtime.backend_gpu import gpu_index
from ..runtime.backend_inductor import PACKAGE, WEIGHTS, memory_format
from .failure import CompileError, gist
from .job import Job

# Without the first, weights are not prepacked; without the second, the thread count of the build would be built in.
FOR_CPU: dict[str, Any] = {"freezing": True, "cpp.dynamic_threads": True}
# Weights stay outside, for several graphs to share. What the CPU does is launch kernels: any of its family may.
FOR_GPU: dict[str, Any] = {"aot_inductor.package_constants_in_so": False, "cpp.march": "", "cpp.simdlen": 1}
# A package and a device are added. Where it crashes, Python says at which line.
OPENER = (sys.executable, "-X", "faulthandler", "-m", f"{__package__}.cli_inductor")

Table = dict[torch._ops.OperatorBase, Callable[..., Any]]


def build(job: Job, folder: Path) -> None:
    """Write model.pt2; for a GPU, which must be here, also weights.safetensors."""
    _require_compiler()
    device = job.target
    job.weights.to(device)
    try:
        if device.type == "cpu":
            compile_package(job, folder, FOR_CPU, decompositions(torch.cpu.get_capabilities().get("amx_tile") is True))
        else:  # torch chooses among its own kernels for attention there
            program = compile_package(job, folder, FOR_GPU, torch.export.default_decompositions())
            save_weights(program, folder, gpu_index(device))
    finally:
        job.weights.to(job.device)


def compile_package(job: Job, folder: Path, config: dict[str, Any], table: Table) -> torch.export.ExportedProgram:
    """Write model.pt2 for the device that the weights are on. The program has the weights under a package's names."""
    spec = job.graph.spec
    # torch 2.11 has no cpp.march: what its packages do on the CPU is compiled for one like the builder's.
    options = inductor_config.get_config_copy()
    known = {name: value for name, value in config.items() if name in options}
    inputs = tuple(
        value.to(job.target).contiguous(memory_format=memory_format(spec, tensor))
        for value, tensor in zip(job.inputs(), spec.inputs, strict=True)
    )
    with torch.no_grad(), warnings.catch_warnings():  # inference mode does not go through the compiler
        warnings.simplefilter("ignore")  # torch's remarks on itself
        program = torch.export.export(job.module(), inputs, strict=False).run_decompositions(table)
        path = str(folder / PACKAGE)
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=known)
    return program


def save_weights(program: torch.export.ExportedProgram, folder: Path, device: torch.device) -> None:
    """Write those that the package reads and does not hold. Graphs that read the same ones get the same bytes."""
    known: dict[str, Any] = {**program.constants, **program.state_dict}
    names = constant_names(folder / PACKAGE, device)
    lost = [name for name in names if not isinstance(known.get(name), Tensor)]
    if lost:
        raise CompileError(f"{folder.stem}: got constants of the compiler's own ({lost[0]}), want weights; report it")
    save_file({name: known[name].detach().cpu().contiguous() for name in names}, folder / WEIGHTS)


def constant_names(package: Path, device: torch.device, opener: Sequence[str] = OPENER) -> list[str]:
    """The weights that a package reads, sorted, as a process says that opens it: one that crashes takes its own alone.

    CompileError where that process fails; what it said is in GRAPH.log, beside the folder GRAPH.work of the package.
    """
    folder = package.resolve().parent
    ran = subprocess.run(
        # Started in our own folder: Python looks for modules where it starts.
        [*opener, package.name, str(device)],
        stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", cwd=folder, check=False,
    )  # fmt: skip
    if ran.returncode == 0:
        return sorted(json.loads(ran.stdout.splitlines()[-1]))
    log, number = folder.with_suffix(".log"), -ran.returncode
    write_text(log, ran.stdout + ran.stderr)
    if number > 0:
        ended = f"killed by signal {number} ({signal.strsignal(number)})"
    else:
        ended = f"that failed ({gist(ran.stderr)})"
    raise CompileError(
        f"{folder.stem}: got a process {ended} where PyTorch {torch.__version__} opens the package, want the names of "
        f"its weights; see {log}, and use another version of PyTorch or another backend, such as --backend tensorrt"
    )


def built_with() -> dict[str, str]:
    """Packages that have a hand in the artifact, and need not be there where it runs."""
    return {}


def decompositions(amx: bool) -> Table:
    """How operations are taken apart for Inductor, on a CPU with or without AMX.

    With it torch's own attention is 1.1 to 4 times as fast as what Inductor makes of the formula; without, it was
    several times slower in bf16.
    """
    table = torch.export.default_decompositions()
    if amx:
        table.pop(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default)
    else:
        table[torch.ops.aten.scaled_dot_product_attention.default] = plain_attention
    return table


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001
    is_causal: bool = False,  # noqa: ARG001
    *,
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: ARG001
) -> Tensor:
    """Attention of q [B, heads, Lq, D] as two products around an exponential, by which Inductor does not know it."""
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)  # [B, heads, Lq, Lk]
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    return (weights @ v) / weights.sum(dim=-1, keepdim=True)


def _require_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        compiler = get_cpp_compiler()
    except Exception as error:  # torch has an error of its own for it
        raise EnvironmentMismatch(
            f"C++ compiler: got none ({' '.join(str(error).split())[:100]}), want one for Inductor; install g++"
        ) from error
    if shutil.which(compiler) is None:
        raise EnvironmentMismatch(f"C++ compiler: got {compiler}, which is not there, want one; install g++")
