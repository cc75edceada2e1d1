"""The eager backend has nothing to compile: its artifact says which graph and which weights were meant."""

import json
from pathlib import Path

from ..engine.plain import to_plain
from .job import Job


def build(job: Job, folder: Path) -> None:
    """Write the graph's spec and its weights' fingerprint."""
    said = {"weights": job.sha256, "spec": to_plain(job.graph.spec)}
    (folder / "graph.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def built_with() -> dict[str, str]:
    """Packages that have a hand in the artifact, and need not be there where it runs."""
    return {}
