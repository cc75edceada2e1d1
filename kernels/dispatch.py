"""Which attention to run: measured once for a shape on a GPU, and kept as a table beside the bundle.

A backend is a name: `triton-...` (ours, one for each tile), `sdpa` (PyTorch's own choice), `cudnn`, `flash`,
`efficient` (PyTorch's, forced), `flash-attn-2`, `flash-attn-3` (those packages). Only ours reads context and own keys
where they lie; for the others joining them is part of what is measured.
"""

import hashlib
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .attention import attention
from .launch import capability

ATEN = torch.ops.aten
# PyTorch's own, called by name: sdpa_kernel would force them by flags that all threads of the process share.
SDPA: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cudnn": lambda q, k, v: ATEN._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0],
    "flash": lambda q, k, v: ATEN._scaled_dot_product_flash_attention(q, k, v)[0],
    "efficient": lambda q, k, v: ATEN._scaled_dot_product_efficient_attention(q, k, v, None, False)[0],
}
PACKAGES = {"flash-attn-2": "flash_attn", "flash-attn-3": "flash_attn_interface"}  # backend: module
LIMIT = 2e-2  # relative error, several times what two right answers in bf16 differ by
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """What the choice depends on: `tokens` own keys, `context` keys in the other buffer, `head_dim`, dtype's name."""

    batch: int
    heads: int
    queries: int
    tokens: int
    context: int
    head_dim: int
    dtype: str

    @property
    def flops(self) -> int:
        """Of the two products, a multiply and an add each."""
        return 4 * self.batch * self.heads * self.queries * (self.tokens + self.context) * self.head_dim


@dataclass(frozen=True)
class Timing:
    """One backend: all samples in milliseconds and the error against fp32, or why it does not count."""

    backend: str
    samples: tuple[float, ...] = ()
    error: float | None = None
    refused: str = ""

    @property
    def lasts(self) -> bool:
        """As `lasting`."""
        return lasting(self.refused)

    @property
    def milliseconds(self) -> float:
        """The median; infinite where the backend does not count."""
        return statistics.median(self.samples) if self.samples and not self.refused else float("inf")


@dataclass(frozen=True)
class Choice:
    """What was measured for a shape: on which GPU, with which versions, every backend."""

    shape: Shape
    gpu: str
    versions: Mapping[str, str]
    timings: tuple[Timing, ...]

    @property
    def best(self) -> Timing:
        """The fastest of those that count."""
        best = min(self.timings, key=lambda timing: timing.milliseconds)
        if best.milliseconds == float("inf"):
            reasons = "; ".join(f"{timing.backend}: {timing.refused or 'no sample'}" for timing in self.timings)
            raise ValueError(f"attention {self.shape}: got no backend that works ({reasons}), want one; update PyTorch")
        return best

    @property
    def teraflops(self) -> float:
        """What the best one reaches, in TFLOP/s."""
        return self.shape.flops / self.best.milliseconds / 1e9


@dataclass(frozen=True)
class ChoiceTable:
    """Choices for any number of shapes and GPUs; adding one gives a new table."""

    choices: tuple[Choice, ...] = ()

    def find(self, shape: Shape, gpu: str) -> Choice | None:
        """The choice measured on this GPU, if there is one."""
        return next((choice for choice in self.choices if (choice.shape, choice.gpu) == (shape, gpu)), None)

    def backend(self, shape: Shape, gpu: str) -> str:
        """The name to run: the measured best, or PyTorch's own choice for what nobody measured."""
        choice = self.find(shape, gpu)
        works = choice is not None and any(timing.milliseconds < float("inf") for timing in choice.timings)
        return choice.best.backend if choice and works else "sdpa"

    def add(self, choice: Choice) -> "ChoiceTable":
        """With this choice in place of an older one for the same shape and GPU."""
        kept = (c for c in self.choices if (c.shape, c.gpu) != (choice.shape, choice.gpu))
        return ChoiceTable((*kept, choice))

    def to_plain(self) -> list[dict[str, Any]]:
        """Lists, dicts, strings and numbers only, as JSON holds them."""
        return [asdict(choice) for choice in self.choices]

    @classmethod
    def from_plain(cls, plain: list[dict[str, Any]]) -> "ChoiceTable":
        """The inverse of to_plain. Raises TypeError or KeyError for anything else."""
        choices = []
        for item in plain:
            timings = tuple(Timing(**(timing | {"samples": tuple(timing["samples"])})) for timing in item["timings"])
            choices.append(Choice(Shape(**item["shape"]), item["gpu"], dict(item["versions"]), timings))
        return cls(tuple(choices))


def installed() -> dict[str, str]:
    """What measurements depend on: torch, our own kernels by a digest, triton and the flash-attn packages if there."""
    versions = {"torch": str(torch.__version__), "kernels": _kernels_digest()}
    if find_spec("triton"):
        versions["triton"] = version("triton")
    for name, module in PACKAGES.items():
        if find_spec(module):
            try:
                versions[name] = version(module.replace("_interface", "_3"))
            except PackageNotFoundError:  # built in place, without metadata
                versions[name] = "unknown"
    return versions


@cache  # read once a process: it is asked for every shape that is measured
def _kernels_digest() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def candidates(shape: Shape, arch: int, packages: Mapping[str, str]) -> tuple[str, ...]:
    """Names worth measuring for a shape on a compute capability (90 for Hopper) with these packages installed."""
    names = ["sdpa", "efficient"]
    half = shape.dtype in ("fp16", "bf16") and arch >= 80
    if half and shape.head_dim <= 256:
        names.append("flash")
        names += ["flash-attn-2"] if "flash-attn-2" in packages else []
    if half and shape.head_dim <= 128:
        names.append("cudnn")
    if half and arch == 90 and shape.head_dim <= 256 and "flash-attn-3" in packages:
        names.append("flash-attn-3")
    if half and shape.head_dim in (64, 128) and "triton" in packages:
        from .window_attention_triton import tiles

        names += [tile.name for tile in tiles(arch)]
    return tuple(names)


def run_backend(
    name: str, q: Tensor, k: Tensor, v: Tensor, context_k: Tensor | None, context_v: Tensor | None
) -> Tensor:
    """Run one backend on CUDA tensors; shapes as in window_attention.attend_eager. Returns [B, Lq, heads, E]."""
    if name.startswith("triton-"):
        from .window_attention_triton import attend, tiles

        known = {tile.name: tile for tile in tiles(capability(q.device))}
        if name not in known:
            raise ValueError(f"attention backend: got {name}, want one of {list(known)} here; measure on this GPU")
        return attend(q, k, v, context_k, context_v, known[name])
    if context_k is not None and context_v is not None:
        k, v = torch.cat((context_k, k), dim=2), torch.cat((context_v, v), dim=2)  # [B, heads, C+L, E]
    if name == "sdpa":
        y = attention(q, k, v)
    elif name in SDPA:
        y = SDPA[name](q, k, v)
    elif name in PACKAGES:
        return run_package(PACKAGES[name], q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    else:
        raise ValueError(f"attention backend: got {name}, want a name of dispatch.candidates; measure again")
    return y.transpose(1, 2).contiguous()  # [B, heads, Lq, E] -> [B, Lq, heads, E]


def run_package(module: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """flash-attn 2 or 3, which take and give [B, L, heads, E]; some versions give a pair."""
    from importlib import import_module

    y = import_module(module).flash_attn_func(q, k, v)
    return (y[0] if isinstance(y, tuple) else y).contiguous()


def device_name(device: torch.device) -> str:
    """What measurements are kept under: the GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def elapsed_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call: between CUDA events, waited for; by the clock on a CPU."""
    if device.type != "cuda":
        start_time = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start_time)
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
    return start.elapsed_time(end)


def refusal(call: Callable[[], object]) -> str:
    """Make a call; why it failed in one line, with what PyTorch warned of meanwhile, or "" if it did not fail."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            call()
        except Exception as error:  # a kernel may refuse a shape or a device in any way it likes
            said = (f"{type(error).__name__}: {error}", *(str(warning.message) for warning in seen))
            return "; ".join(dict.fromkeys(" ".join(text.split())[:150] for text in said))
    return ""


def lasting(refused: str) -> bool:
    """Whether what `refusal` said, or "", would be so again: memory that ran out may have been another program's."""
    return not refused.startswith(torch.OutOfMemoryError.__name__)


def measure(shape: Shape, device: torch.device, repeats: int = 20) -> Choice:
    """Run and time every candidate on a device. Seconds at 2K; nothing else should run there."""
    packages = installed()
    timings: list[Timing] = []
    inputs = random_inputs(shape, device)
    want = sample_rows(inputs)
    for name in candidates(shape, capability(device), packages):
        refused = refusal(lambda name=name: timings.append(time_backend(name, inputs, want, repeats)))
        if refused:
            timings.append(Timing(name, refused=refused))
    return Choice(shape, device_name(device), packages, tuple(timings))


Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def random_inputs(shape: Shape, device: torch.device) -> Inputs:
    """q, k, v and context as the engine has them: q and k head-major, v a view of the token-major projection."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=DTYPES[shape.dtype])

    batch, heads, dim = shape.batch, shape.heads, shape.head_dim
    q, k = draw(batch, heads, shape.queries, dim), draw(batch, heads, shape.tokens, dim)
    v = draw(batch, shape.tokens, heads, dim).transpose(1, 2)  # [B, L, heads, E] -> [B, heads, L, E]
    if not shape.context:
        return q, k, v, None, None
    context = draw(2, batch, heads, shape.context, dim)
    return q, k, v, context[0], context[1]


def sample_rows(inputs: Inputs, rows: int = 256) -> Tensor:
    """The right answer for the last queries, in fp64: all of them would not fit. Returns [B, rows, heads, E]."""
    q, k, v, context_k, context_v = inputs
    if context_k is not None and context_v is not None:
        k, v = torch.cat((context_k, k), dim=2), torch.cat((context_v, v), dim=2)
    answers = []
    for head in range(q.shape[1]):
        scores = q[:, head, -rows:].double() @ k[:, head].double().mT * q.shape[-1] ** -0.5  # [B, rows, L]
        answers.append(scores.softmax(dim=-1) @ v[:, head].double())
    return torch.stack(answers, dim=2)


def time_backend(name: str, inputs: Inputs, want: Tensor, repeats: int) -> Timing:
    """Check one backend on the last queries, then time it; three runs warm it up."""
    got = run_backend(name, *inputs)[:, -want.shape[1] :].double()
    error = float((got - want).norm() / want.norm())
    if not error <= LIMIT:
        return Timing(name, error=error, refused=f"relative error {error:.1e}, the limit is {LIMIT:.0e}")
    device = inputs[0].device
    samples = [elapsed_ms(lambda: run_backend(name, *inputs), device) for _ in range(3 + repeats)]
    return Timing(name, tuple(samples[3:]), error)
