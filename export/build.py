"""From modules to a bundle, graph by graph.

What is finished stays: an interrupted build goes on where it stopped, and a build compiles only the graphs whose key
no bundle has that is there already.
"""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..engine.errors import ProfileError
from ..engine.graphs import Graph, profile_graphs
from ..engine.manifest import PRECISIONS, Artifact, Bundle, GraphRecord, Manifest, sha256_of
from ..runtime.backend_cache import keep_folder
from ..runtime.backend_registry import find_backend
from ..runtime.backend_weights import Source
from .builders import Processes, find_builder
from .failure import compiling
from .job import Job
from .keys import GraphKey, graph_keys
from .parity import parity_error
from .part_folder import Finished, check_out, finish, finished_graphs, keep_graph, part_folder, put_graph
from .target import Target, make_target, run_device

POLL = 0.05  # seconds between looks at processes


@dataclass(frozen=True)
class BuildProgress:
    """Which graph is at work, or done if it has a record; `kept` ones were there already."""

    name: str
    index: int
    total: int
    record: GraphRecord | None = None
    seconds: float = 0.0
    kept: bool = False


OnBuild = Callable[[BuildProgress], None]


def build_bundle(
    source: Source,
    backend: str,
    out: Path,
    names: Sequence[str] | None = None,
    on_progress: OnBuild | None = None,
    archs: Sequence[str] = (),
    jobs: int = 1,
    reuse: Sequence[Path] = (),
) -> Bundle:
    """Compile the graphs of a source into the bundle `out`; `names` None are all of them.

    A bundle that is there already is replaced when the new one is whole; graphs in it that were not asked for stay
    where they still fit. `archs` are for backends that build for other machines; with `inductor`, this GPU's makes a
    bundle for it. `jobs` graphs are compiled at once where that is the work of other processes. Graphs are taken from
    the bundles `reuse` where their key is equal and their files are whole. CompileError for a graph that the compiler
    fails on, NumericsError for one that does not compute what eager does.
    """
    target = make_target(source, backend, archs)
    graphs = profile_graphs(source.profile, PRECISIONS[source.precision])
    picked = pick_graphs(graphs, names)
    report = on_progress or (lambda _: None)
    out = out.absolute()  # `.` has no name that a .part could stand beside
    check_out(out)
    with part_folder(out) as part:
        own = {**finished_graphs(out), **finished_graphs(part)}
        there = [finished_graphs(folder) for folder in (part, out, *reuse)]
        keys = graph_keys({name: graphs[name] for name in graphs if name in picked or name in own}, source, target)
        records: dict[str, GraphRecord] = {}
        seconds: dict[str, float] = {}
        kept = set()
        work: list[_Work] = []
        for name, key in keys.items():
            record = _kept(part, [found[name] for found in there if name in found], key)
            if record is not None:
                records[name] = record
                kept.add(name)
            elif name in picked:
                work.append(_Work(graphs[name], source, target, key, part, keep_folder(out)))
        for name in [name for name in picked if name in kept]:
            report(BuildProgress(name, picked.index(name), len(picked), records[name], kept=True))

        def starts(one: _Work) -> None:
            report(BuildProgress(one.name, picked.index(one.name), len(picked)))

        for one in _run(work, jobs, starts):
            records[one.name], seconds[one.name] = one.finish(), round(time.perf_counter() - one.started, 3)
            place = picked.index(one.name)
            report(BuildProgress(one.name, place, len(picked), records[one.name], seconds[one.name]))
        manifest = Manifest(
            source.profile, backend, source.precision, target.arch, target.versions, target.built_with,
            source.record, {name: records[name] for name in graphs if name in records}, seconds,
        )  # fmt: skip
        return finish(part, out, manifest)


def pick_graphs(graphs: dict[str, Graph], names: Sequence[str] | None) -> list[str]:
    """The graphs that were asked for, in the profile's order."""
    unknown = [name for name in names or () if name not in graphs]
    if unknown:
        raise ProfileError(f"graphs: got {', '.join(unknown)}, want some of {', '.join(graphs)}; correct --graphs")
    return [name for name in graphs if not names or name in names]


def _kept(part: Path, finished: Sequence[Finished], key: GraphKey) -> GraphRecord | None:
    """The first of the finished graphs that has the key and is whole, taken over into the folder."""
    return next((one[1] for one in finished if one[1].key == key.digest and keep_graph(part, one)), None)


class _Work:
    """One graph that is being compiled, here or by processes."""

    def __init__(self, graph: Graph, source: Source, target: Target, key: GraphKey, part: Path, keep: Path) -> None:
        self.graph, self.source, self.target, self.key, self.part, self.keep = graph, source, target, key, part, keep
        self.name = graph.spec.name
        self.module = source.modules[graph.weights]
        self.folder = part / f"{self.name}.work"
        self.started = 0.0
        self._steps: Processes | None = None
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Compile it, as far as that is done here."""
        self.started = time.perf_counter()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        precision, device, archs = self.source.precision, self.source.device, self.target.archs
        job = Job(self.graph, self.module, self.key.weights, precision, device, archs, self.keep)
        with self._compiling():
            self._steps = find_builder(self.target.backend).build(job, self.folder)
            self._process = None if self._steps is None else next(self._steps, None)

    def is_done(self) -> bool:
        """Whether nothing is left to wait for; starts the next process where one has ended."""
        while self._steps is not None and self._process is not None and self._process.poll() is not None:
            with self._compiling():
                self._process = next(self._steps, None)
        return self._process is None

    def _compiling(self) -> AbstractContextManager[None]:
        return compiling(self.name, self.target.backend, self.part / f"{self.name}.log")

    def stop(self) -> None:
        """End the process that is at work, if any."""
        if self._steps is not None:
            self._steps.close()

    def finish(self) -> GraphRecord:
        """Run it beside eager where it can run here, and put its artifacts into the bundle."""
        files = tuple(sorted(self.folder.iterdir()))
        device = run_device(self.target)
        error = None
        if device is not None:
            error = self._parity(files, device)
        artifacts = tuple(Artifact(f"{self.name}/{file.name}", file.stat().st_size, sha256_of(file)) for file in files)
        record = GraphRecord(self.graph.spec, self.graph.weights, self.key.digest, error, artifacts)
        put_graph(self.part, self.folder, record)
        return record

    def _parity(self, files: tuple[Path, ...], device: torch.device) -> float:
        module = self.module.to(device)
        executable = find_backend(self.target.backend).open_graph(self.graph, module, files, device)
        try:
            return parity_error(executable, self.graph, module, self.source.precision, device)
        finally:
            executable.close()
            self.module.to(self.source.device)


def _run(work: Sequence[_Work], jobs: int, starts: Callable[[_Work], None]) -> Iterator[_Work]:
    """Every graph once it is compiled; at most `jobs` of them are at work. Processes end with the caller."""
    waiting, running = list(work), list[_Work]()
    try:
        while waiting or running:
            if waiting and len(running) < jobs:
                one = waiting.pop(0)
                starts(one)
                running.append(one)
                one.start()
            done = [one for one in running if one.is_done()]
            for one in done:
                running.remove(one)
                yield one
            if not done and (not waiting or len(running) >= jobs):
                time.sleep(POLL)
    finally:
        for one in running:
            one.stop()
