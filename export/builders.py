"""The backends that compile, one line each. runtime/backend_registry.py has those that run what they made."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..engine.errors import EnvironmentMismatch
from . import eager, inductor, onnxruntime
from .job import Job


@dataclass(frozen=True)
class Builder:
    """How a backend compiles a graph: `build` writes its artifacts, one or more files, to an empty folder.

    `built_with` are the versions of packages that have a hand in them and need not be there where they run.
    """

    build: Callable[[Job, Path], None]
    built_with: Callable[[], dict[str, str]]


BUILDERS = {
    "eager": Builder(eager.build, eager.built_with),
    "inductor": Builder(inductor.build, inductor.built_with),
    "onnxruntime": Builder(onnxruntime.build, onnxruntime.built_with),
}


def find_builder(name: str) -> Builder:
    """The builder of that name."""
    if name not in BUILDERS:
        raise EnvironmentMismatch(f"backend: got {name!r}, want one of {', '.join(BUILDERS)}; pick one")
    return BUILDERS[name]
