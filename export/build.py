"""From modules to a bundle, graph by graph.

What is finished stays: an interrupted build goes on where it stopped, and a second build of a bundle compiles only
the graphs whose key has changed.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..engine.errors import ProfileError
from ..engine.graphs import Graph, profile_graphs
from ..engine.manifest import PRECISIONS, Artifact, Bundle, GraphRecord, Manifest, read_bundle, sha256_of
from ..engine.plain import to_plain
from ..runtime.backend_registry import find_backend, versions_here
from ..runtime.backend_weights import Source
from .builders import find_builder
from .job import Job
from .parity import parity_error
from .part_folder import Finished, check_out, finish, finished_graphs, keep_graph, part_folder, put_graph


@dataclass(frozen=True)
class Target:
    """What all graphs of a build have in common, beside their source."""

    backend: str
    arch: str
    versions: dict[str, str]
    built_with: dict[str, str]


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
    source: Source, backend: str, out: Path, names: Sequence[str] | None = None, on_progress: OnBuild | None = None
) -> Bundle:
    """Compile the graphs of a source into the bundle `out`; `names` None are all of them.

    A bundle that is there already is replaced when the new one is whole; graphs in it that were not asked for stay
    where they still fit. NumericsError for a graph that does not compute what eager does.
    """
    target = make_target(source, backend)
    graphs = profile_graphs(source.profile, PRECISIONS[source.precision])
    picked = pick_graphs(graphs, names)
    report = on_progress or (lambda _: None)
    check_out(out)
    with part_folder(out) as part:
        there = [finished_graphs(part), finished_graphs(out)]
        records: dict[str, GraphRecord] = {}
        seconds: dict[str, float] = {}
        for name, graph in graphs.items():
            key = graph_key(graph, source, target)
            kept = _kept(part, [found[name] for found in there if name in found], key)
            if kept is not None:
                records[name] = kept
            if name not in picked:
                continue
            place = BuildProgress(name, picked.index(name), len(picked))
            if kept is None:
                report(place)
                started = time.perf_counter()
                records[name] = _build_graph(graph, source, target, key, part)
                seconds[name] = round(time.perf_counter() - started, 3)
            report(
                BuildProgress(
                    name, place.index, place.total, records[name], seconds.get(name, 0.0), kept=kept is not None
                )
            )
        manifest = Manifest(
            source.profile, backend, source.precision, target.arch, target.versions, target.built_with,
            source.record, records, seconds,
        )  # fmt: skip
        finish(part, out, manifest)
    return read_bundle(out)


def make_target(source: Source, backend: str) -> Target:
    """What this machine builds for itself. EnvironmentMismatch where the backend's packages are missing."""
    arch = find_backend(backend).arch(source.device)
    return Target(backend, arch, versions_here(backend), find_builder(backend).built_with())


def pick_graphs(graphs: dict[str, Graph], names: Sequence[str] | None) -> list[str]:
    """The graphs that were asked for, in the profile's order."""
    unknown = [name for name in names or () if name not in graphs]
    if unknown:
        raise ProfileError(f"graphs: got {', '.join(unknown)}, want some of {', '.join(graphs)}; correct --graphs")
    return [name for name in graphs if not names or name in names]


def graph_key(graph: Graph, source: Source, target: Target) -> str:
    """SHA-256 (hex) of all that decides the artifacts of a graph."""
    said = {
        "spec": to_plain(graph.spec),
        "weights": source.record.sha256[graph.weights],
        "precision": source.precision,
        "target": to_plain(target),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _kept(part: Path, finished: Sequence[Finished], key: str) -> GraphRecord | None:
    """The first of the finished graphs that has the key and is whole, taken over into the folder."""
    return next((one[1] for one in finished if one[1].key == key and keep_graph(part, one)), None)


def _build_graph(graph: Graph, source: Source, target: Target, key: str, part: Path) -> GraphRecord:
    """Compile a graph, run it beside eager, and put its artifacts into the folder."""
    name, work, module = graph.spec.name, part / "work", source.modules[graph.weights]
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    job = Job(graph, module, source.record.sha256[graph.weights], source.precision, source.device)
    find_builder(target.backend).build(job, work)
    files = tuple(sorted(work.iterdir()))
    executable = find_backend(target.backend).open_graph(graph, module, files, source.device)
    try:
        error = parity_error(executable, graph, module, source.precision, source.device)
    finally:
        executable.close()
    artifacts = tuple(Artifact(f"{name}/{file.name}", file.stat().st_size, sha256_of(file)) for file in files)
    record = GraphRecord(graph.spec, graph.weights, key, error, artifacts)
    put_graph(part, work, record)
    return record
