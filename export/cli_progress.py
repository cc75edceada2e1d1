"""Progress of a build on stderr: a bar on a terminal, plain lines elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .build import BuildProgress, OnBuild


@contextmanager
def show_build(console: Console, quiet: bool) -> Iterator[OnBuild | None]:
    """A callback for build_bundle that shows where it is."""
    if quiet:
        yield None
    elif not console.is_terminal:
        yield lambda progress: _print_line(console, progress)
    else:
        columns = (
            TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console) as bars:
            task = bars.add_task("graphs", total=None, note="")

            def advance(progress: BuildProgress) -> None:
                done = progress.record is not None
                note = _words(progress) if done else "compiling"
                completed = progress.index + int(done)
                bars.update(task, description=progress.name, total=progress.total, completed=completed, note=note)

            yield advance


def _print_line(console: Console, progress: BuildProgress) -> None:
    if progress.record is not None:
        console.print(f"{progress.name}: {_words(progress)} ({progress.index + 1}/{progress.total})")


def _words(progress: BuildProgress) -> str:
    record = progress.record
    if record is None:
        return ""
    made = "kept" if progress.kept else f"built in {progress.seconds:.1f} s"
    parity = "not run here" if record.parity is None else f"error {record.parity:.1e}"
    return f"{made}, {record.bytes:,} bytes, {parity}"
