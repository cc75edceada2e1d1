"""Progress: bars with an ETA on a terminal, plain lines elsewhere, or what a farm manager reads."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Literal

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from .farm import News, OnNews
from .session import OnProgress, Progress

NewsStyle = Literal["bar", "json", "openjd", "none"]


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


@contextmanager
def show_news(console: Console, how: NewsStyle) -> Iterator[OnNews]:
    """A callback for Farm.render: bar or plain lines, JSON lines on stderr, or Open Job Description's on stdout."""
    if how == "none":
        yield lambda _: None
    elif how == "json":
        yield lambda news: click.echo(json.dumps(asdict(news)), err=True)
    elif how == "openjd":
        yield _print_openjd
    elif not console.is_terminal:
        yield lambda news: None if news.event == "progress" else console.print(_words(news))
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Bars(*columns, console=console) as bars:
            task = bars.add_task("", total=1.0)

            def advance(news: News) -> None:
                bars.update(task, completed=news.fraction, description=_words(news))

            yield advance


def _print_openjd(news: News) -> None:
    click.echo(f"openjd_progress: {100 * news.fraction:.1f}")
    click.echo(f"openjd_{'fail' if news.event in ('failed', 'stopped') else 'status'}: {_words(news)}")


def _words(news: News) -> str:
    text = news.text if news.event in ("progress", "segment") else f"{news.event} {news.text}"
    return " ".join(f"{news.shot}: {text}".split())
