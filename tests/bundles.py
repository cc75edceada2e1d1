"""What the tests of bundles share: building them, spoiling them, catching refusals."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swifti2v.engine.errors import SwiftError
from swifti2v.engine.manifest import Bundle, Precision, read_bundle, write_manifest
from swifti2v.engine.presets import get_profile
from swifti2v.export.build import build_bundle
from swifti2v.runtime.backend_weights import open_source

COMMANDS = {
    "swifti2v": "from swifti2v.runtime.cli import main; main()",
    "swifti2v-export": "from swifti2v.export.cli import main; main()",
}


def build(folder: Path, backend: str = "eager", precision: Precision = "fp32", names: list[str] | None = None) -> Bundle:
    """A bundle of the tiny profile with untrained weights."""
    return build_bundle(open_source(get_profile("tiny"), precision=precision), backend, folder, names)


def change(folder: Path, **fields: Any) -> None:
    """Write the manifest again with other fields, and a digest that fits them."""
    write_manifest(folder, replace(read_bundle(folder).manifest, **fields))


def flip(path: Path, at: int) -> None:
    """Change one byte of a file, and nothing else of it."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def refused(call: Callable[[], Any], *words: str, kind: type[SwiftError] = SwiftError) -> str:
    """The text of the refusal: one line that says what differs and what to do, with all the words in it."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert re.fullmatch(r".+: got .+, want .+; .+", text), text
    for word in words:
        assert word in text, text
    return text


def command(name: str, *arguments: object, cache: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run one of our commands as a user does, with a cache of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SWIFTI2V_CACHE": str(cache)}
    line = [sys.executable, "-c", COMMANDS[name], *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=environment, **options)
