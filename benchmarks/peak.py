"""The rate that a device cannot beat, against which every time is shown: from a data sheet, or measured here."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from ..engine.errors import EnvironmentMismatch
from .clock import CLOCKS, ClockName

BUDGET = 0.5  # seconds of products


@dataclass(frozen=True)
class Peak:
    """The highest rate of dense products of a device in one dtype, in FLOP/s, and where the number is from."""

    rate: float
    source: str

    def as_json(self) -> dict[str, object]:
        return {"tflops": round(self.rate / 1e12, 4), "source": self.source}


H100_SHEET = "NVIDIA H100 data sheet, SXM, dense (nvidia.com/en-us/data-center/h100)"
H200_SHEET = "NVIDIA H200 data sheet, SXM, dense (nvidia.com/en-us/data-center/h200)"
A100_SHEET = "NVIDIA A100 data sheet, dense (nvidia.com/en-us/data-center/a100)"
ADA_PAPER = "NVIDIA Ada GPU architecture whitepaper, RTX 4090, dense, FP32 accumulate"
# Name as torch gives it, or its pattern -> TFLOP/s by dtype; NVL, laptop and other cards have names of their own.
# fp32 is plain fp32 as in eager torch: TF32 is off there.
KNOWN: dict[str, tuple[dict[torch.dtype, float], str]] = {
    "NVIDIA H200": ({torch.bfloat16: 989.4, torch.float16: 989.4, torch.float32: 66.9}, H200_SHEET),
    "NVIDIA H100 80GB HBM3": ({torch.bfloat16: 989.4, torch.float16: 989.4, torch.float32: 66.9}, H100_SHEET),
    "NVIDIA A100*": ({torch.bfloat16: 312.0, torch.float16: 312.0, torch.float32: 19.5}, A100_SHEET),
    "NVIDIA GeForce RTX 4090": ({torch.bfloat16: 165.2, torch.float16: 165.2, torch.float32: 82.6}, ADA_PAPER),
}


def device_peak(device: torch.device, dtype: torch.dtype, clock: ClockName = "wall") -> Peak:
    """The data sheet's rate for a known GPU, else the best that square products reach here and now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, (rates, source) in KNOWN.items():
            if fnmatchcase(name, known) and dtype in rates:
                return Peak(rates[dtype] * 1e12, source)
    return measured_peak(device, dtype, clock)


def measured_peak(device: torch.device, dtype: torch.dtype, clock: ClockName = "wall") -> Peak:
    """The best rate of a square product within half a second, over several sizes.

    It is a rate that was reached, not a limit: another kernel may come out a little above 100 % of it.
    """
    sizes = (1024, 2048) if device.type == "cpu" else (4096, 8192)
    best, best_size = 0.0, 0
    for size in sizes:
        generator = torch.Generator(device).manual_seed(0)
        a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
        rate = _best_rate(a, b, device, clock)
        if rate > best:
            best, best_size = rate, size
    if best <= 0:
        raise EnvironmentMismatch(f"{device}: got no product that could be timed, want one; use another device")
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return Peak(best, f"measured in this run: best {best_size}^3 product in {str(dtype)[6:]}{threads}")


def _best_rate(a: torch.Tensor, b: torch.Tensor, device: torch.device, clock: ClockName) -> float:
    now = CLOCKS[clock]
    best, count, until = 0.0, 0, now() + BUDGET
    while count < 5 or now() < until:
        start = now()
        torch.matmul(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, count = max(best, 2 * a.shape[0] ** 3 / (now() - start)), count + 1
    return best
