"""Where bundles lie that were built without a place of their own: in the user's cache, found again by what they are."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..engine.manifest import MANIFEST, WeightsRecord
from ..engine.plain import to_plain
from ..engine.spec import GraphSpec


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where caches go: $SWIFTI2V_CACHE, else swifti2v in the user's cache folder."""
    if own := environment.get("SWIFTI2V_CACHE"):
        return Path(own)
    base = environment.get("XDG_CACHE_HOME") or environment.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "swifti2v"


def bundle_place(
    cache: Path, name: str, backend: str, precision: str, arch: str, record: WeightsRecord, specs: Iterable[GraphSpec]
) -> Path:
    """The folder of a bundle in the cache. Versions are no part of it, so that a rebuild takes the old one's place."""
    said = json.dumps([arch, sorted(record.sha256.items()), [to_plain(spec) for spec in specs]])
    return cache / "bundles" / f"{name}-{backend}-{precision}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"


def bundle_folders(cache: Path, name: str = "*") -> list[Path]:
    """The bundles of that profile in the cache, or of all, the last built first.

    A folder with a suffix is one that is being built or replaced.
    """
    found = [path for path in (cache / "bundles").glob(f"{name}-*/{MANIFEST}") if not path.parent.suffix]
    return [path.parent for path in sorted(found, key=_time, reverse=True)]


def _time(path: Path) -> float:
    """When a file was written; one that another process has just replaced is old."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def keep_folder(bundle: Path) -> Path:
    """The folder beside a bundle for what may be lost: timings of a compiler, kernels compiled for one GPU."""
    bundle = bundle.absolute()  # `.` has no name
    return bundle.parent / (bundle.name + ".cache")
