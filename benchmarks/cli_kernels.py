"""`python -m swifti2v.benchmarks.cli_kernels FILE`: which kernels were chosen on a GPU, and by which times.

FILE is the kernels.json that --kernels wrote. Fast enough to be read after every run: it opens no model.
"""

import json
import statistics
from pathlib import Path

import click

from ..engine.errors import MediaError
from ..kernels.dispatch import Choice
from ..kernels.kernel_table import KernelTable, OpTiming
from .report import table

ATTENTION = ("attention of", "heads", "dtype", "chosen", "ms", "TFLOP/s", "the others, in ms")
OPS = ("op", "on", "eager ms", "fused ms", "error", "faster")


def attention_cells(choice: Choice) -> tuple[str, ...]:
    """A row for the table of ATTENTION."""
    shape, best = choice.shape, choice.best
    beside = [timing for timing in choice.timings if timing is not best]
    tried = sorted((t for t in beside if not t.refused), key=lambda timing: timing.milliseconds)
    said = [f"{timing.backend} {timing.milliseconds:.3g}" for timing in tried]
    said += [f"{timing.backend} refused" for timing in beside if timing.refused]
    size = f"{shape.queries} x {shape.tokens + shape.context}"
    return (
        size, str(shape.heads), shape.dtype, best.backend, f"{best.milliseconds:.3g}", f"{choice.teraflops:.4g}",
        ", ".join(said),
    )  # fmt: skip


def op_cells(timing: OpTiming) -> tuple[str, ...]:
    """A row for the table of OPS. A run uses the form that is the faster one on that call."""
    eager, fused = (f"{statistics.median(times):.3g}" if times else "" for times in (timing.eager, timing.fused))
    error = "" if timing.error is None else f"{timing.error:.0e}"
    faster = "fused refused" if timing.refused else ("fused" if timing.wins else "eager")
    return timing.op, timing.call, eager, fused, error, faster


def words(kernels: KernelTable) -> str:
    """Both tables of every GPU that was measured."""
    said = []
    for gpu in dict.fromkeys([*(c.gpu for c in kernels.attention.choices), *(op.gpu for op in kernels.ops)]):
        ops = [timing for timing in kernels.ops if timing.gpu == gpu]
        attention = [choice for choice in kernels.attention.choices if choice.gpu == gpu]
        said.append(gpu)
        said.append(table(ATTENTION, [attention_cells(choice) for choice in attention]))
        said.append(table(OPS, [op_cells(timing) for timing in ops]))
    return "\n".join(said)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
def main(file: Path) -> None:
    """Print what was measured of kernels."""
    try:
        kernels = KernelTable.from_plain(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise click.ClickException(str(MediaError(f"kernels {file}: got '{error}', want a kernels.json"))) from error
    click.echo(words(kernels))


if __name__ == "__main__":
    main()
