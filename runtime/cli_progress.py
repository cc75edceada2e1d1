"""Progress on stderr: bars with an ETA on a terminal, plain lines elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from .session import OnProgress, Progress


@contextmanager
def show_progress(console: Console, quiet: bool) -> Iterator[OnProgress | None]:
    """A callback for Session.generate that shows where it is."""
    if quiet:
        yield None
    elif not console.is_terminal:
        yield lambda progress: _print_line(console, progress)
    else:
        columns = (
            TextColumn("{task.description:<9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=console) as bars:
            tasks = {
                "stage1": bars.add_task("Stage I", total=None, note=""),
                "stage2": bars.add_task("Stage II", total=None, note="", start=False),
            }

            def advance(progress: Progress) -> None:
                if progress.phase == "prompt":
                    return
                task, segments = tasks[progress.phase], max(progress.segments, 1)
                bars.start_task(task)
                place = f"segment {progress.segment + 1}/{segments}, " if progress.phase == "stage2" else ""
                note = place + progress.what
                done = progress.segment * progress.total + progress.done
                bars.update(task, total=segments * progress.total, completed=done, note=note)

            yield advance


def _print_line(console: Console, progress: Progress) -> None:
    name = {"prompt": "Prompt", "stage1": "Stage I", "stage2": "Stage II"}[progress.phase]
    place = f"segment {progress.segment + 1}/{progress.segments}, " if progress.phase == "stage2" else ""
    console.print(f"{name}: {place}{progress.what} ({progress.done}/{progress.total})")
