"""Checks for machines without pytest: the same clip as on the CPU, and memory that does not grow with the clip.

`python -m swifti2v.benchmarks.cli_check --device cuda` prints a line for each and exits with 1 if one fails.
"""

import sys
from collections.abc import Callable, Iterator

import click
import numpy as np
import torch

from ..engine.presets import get_profile
from ..engine.profile import Profile
from ..runtime.models import load_models
from ..runtime.session import Session
from .clips import sample_request
from .measure import measured

Check = Callable[[torch.device], tuple[bool, str]]


def frames_of(profile: Profile, device: torch.device, dtype: torch.dtype) -> np.ndarray:
    """A clip of a noise image, uint8 [T, H, W, 3]."""
    with Session.open(load_models(profile, device=device, dtype=dtype)) as session:
        return np.concatenate([chunk.frames for chunk in session.generate(sample_request(session.profile))])


def same_as_cpu(device: torch.device) -> tuple[bool, str]:
    """fp32 on the device gives the CPU's frames, but for rounding."""
    profile = get_profile("tiny").override(frames=17)
    one, other = (frames_of(profile, place, torch.float32) for place in (torch.device("cpu"), device))
    away = np.abs(one.astype(int) - other.astype(int))
    return bool(away.mean() < 0.05 and np.percentile(away, 99.9) <= 2), f"mean distance {away.mean():.4f} levels"


def bf16_near_fp32(device: torch.device) -> tuple[bool, str]:
    """bf16 stays near fp32."""
    profile = get_profile("tiny").override(frames=17)
    wide, narrow = (frames_of(profile, device, dtype) for dtype in (torch.float32, torch.bfloat16))
    away = float(np.abs(wide.astype(int) - narrow.astype(int)).mean())
    return away < 8, f"mean distance {away:.3f} levels"


def memory_is_flat(device: torch.device) -> tuple[bool, str]:
    """A clip of twice the length takes no more of the device's memory."""
    peaks = []
    for length in (17, 33):
        with measured(device) as cost:
            frames_of(get_profile("tiny").override(frames=length), device, torch.bfloat16)
        peaks.append(cost.peak_bytes or 0)
    grown = peaks[1] / max(peaks[0], 1)
    return grown < 1.1, f"peak {peaks[1] / 1e9:.3f} GB, {grown:.3f} times that of half the length"


CHECKS: tuple[Check, ...] = (same_as_cpu, bf16_near_fp32, memory_is_flat)


def run_checks(device: torch.device) -> Iterator[tuple[str, bool, str]]:
    """Name, whether it holds, and what was seen, of every check."""
    for check in CHECKS:
        holds, seen = check(device)
        yield check.__name__, holds, seen


@click.command()
@click.option("--device", default="cuda", show_default=True)
def main(device: str) -> None:
    """Run every check and exit with 1 if one fails."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    failed = 0
    for name, holds, seen in run_checks(torch.device(device)):
        click.echo(f"{'ok' if holds else 'FAILED'}: {name}: {seen}")
        failed += not holds
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
