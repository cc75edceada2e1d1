"""The folder that a bundle grows in: one process at a time, finished graphs kept, renamed when it is whole."""

import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from ..engine.errors import BundleError, SwiftError
from ..engine.manifest import (
    MANIFEST,
    PART,
    Bundle,
    GraphRecord,
    Manifest,
    damage,
    read_bundle,
    write_manifest,
    write_text,
)
from ..engine.plain import PlainError, from_plain, to_plain

RECORDS = "finished"  # one record for every graph that is done
Finished = tuple[Path, GraphRecord]  # a graph's record, and the folder that its artifacts lie in


def check_out(out: Path) -> None:
    """Refuse to replace what is not a bundle; a damaged one still is."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not _is_bundle(out)):
        raise BundleError(f"{out}: got something that is no bundle, want a new folder or a bundle; choose another -o")


def _is_bundle(folder: Path) -> bool:
    """Whether a folder's manifest.json is one of ours, whole or not: other programs write files of that name."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return '"digest"' in text and '"format"' in text


@contextmanager
def part_folder(out: Path) -> Iterator[Path]:
    """The .part folder of a bundle, held by one process; what it holds of earlier builds is still there."""
    part = out.with_name(out.name + PART)
    part.mkdir(parents=True, exist_ok=True)
    with _held(part):
        (part / RECORDS).mkdir(exist_ok=True)
        yield part


def finished_graphs(folder: Path) -> dict[str, Finished]:
    """The graphs of a bundle, or of a build that was interrupted. Damaged records are left out, to be built anew."""
    if (folder / MANIFEST).is_file():
        with suppress(SwiftError):
            return {name: (folder, record) for name, record in read_bundle(folder).manifest.graphs.items()}
    found = {}
    for path in sorted((folder / RECORDS).glob("*.json")):
        with suppress(PlainError, ValueError, OSError):
            record = from_plain(GraphRecord, json.loads(path.read_text(encoding="utf-8")), path.name)
            found[record.spec.name] = (folder, record)
    return found


def keep_graph(part: Path, finished: Finished) -> bool:
    """Take a finished graph over into the folder; False if an artifact is missing or damaged.

    The files are looked at once they are here, where no other process changes them.
    """
    folder, record = finished
    if folder != part:
        work = part / f"{record.spec.name}.work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            for artifact in record.artifacts:
                _link_or_copy(folder / artifact.path, work / PurePosixPath(artifact.path).name)
        except FileNotFoundError:  # missing, or another process has just replaced that bundle
            shutil.rmtree(work)
            return False
        _take_in(part, work, record)
    if any(damage(part, artifact) for artifact in record.artifacts):
        return False
    write_record(part, record)
    return True


def put_graph(part: Path, work: Path, record: GraphRecord) -> None:
    """Take artifacts in from the folder `work`. The record comes last: where it is, the graph is done."""
    _take_in(part, work, record)
    write_record(part, record)


def write_record(part: Path, record: GraphRecord) -> None:
    write_text(part / RECORDS / f"{record.spec.name}.json", json.dumps(to_plain(record), indent=2))


def finish(part: Path, out: Path, manifest: Manifest) -> Bundle:
    """Make the .part folder the bundle, and return it as it was written. An older bundle stays until then."""
    for path in part.iterdir():
        if path.name not in (*manifest.graphs, RECORDS):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _link_twins(part, manifest)
    write_manifest(part, manifest)
    written = read_bundle(part).manifest
    shutil.rmtree(part / RECORDS)
    for left in out.parent.glob(f"{glob.escape(out.name)}.*.old{PART}"):  # by a build that was killed just here
        shutil.rmtree(left, ignore_errors=True)
    old = out.with_name(f"{out.name}.{os.getpid()}.old{PART}")  # the next build may be here before this one cleans up
    if out.is_dir():
        out.rename(old)
    part.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    return Bundle(out, written)


def _take_in(part: Path, work: Path, record: GraphRecord) -> None:
    target = part / record.spec.name
    (part / RECORDS / f"{record.spec.name}.json").unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    work.rename(target)


def _link_twins(part: Path, manifest: Manifest) -> None:
    """Keep files that graphs have in common, as weights are, once on the disk, where the file system can do that."""
    seen: dict[str, Path] = {}
    for artifact in (artifact for record in manifest.graphs.values() for artifact in record.artifacts):
        file = part / artifact.path
        twin = seen.setdefault(artifact.sha256, file)
        if twin is not file and not twin.samefile(file):
            spare = file.with_name(file.name + PART)
            with suppress(OSError):
                os.link(twin, spare)
                spare.replace(file)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder; it goes with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no locks on folders
        yield
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        raise _busy(folder) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = folder.is_dir() and os.fstat(handle).st_ino == folder.stat().st_ino
        except BlockingIOError:
            mine = False
        if not mine:
            raise _busy(folder)
        yield
    finally:
        os.close(handle)


def _busy(folder: Path) -> BundleError:
    """Another process builds here, or finished and renamed the folder just now."""
    return BundleError(f"{folder}: got another build at work, want none; wait for it, or choose another -o")
