"""What the tests of bundles share: building them, spoiling them, catching refusals."""

import io
import os
import re
import signal
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from swifti2v.engine.errors import SwiftError
from swifti2v.engine.manifest import Bundle, Precision, read_bundle, write_manifest
from swifti2v.engine.presets import get_profile
from swifti2v.export.build import build_bundle
from swifti2v.runtime.backend_weights import open_source

MAINS = {"swifti2v": "swifti2v.runtime.cli", "swifti2v-export": "swifti2v.export.cli"}


def build(
    folder: Path, backend: str = "eager", precision: Precision = "fp32", names: list[str] | None = None
) -> Bundle:
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


@dataclass(frozen=True)
class Ran:
    """What a command gave back."""

    returncode: int
    stdout: str
    stderr: str


def command(name: str, *arguments: object, cache: Path) -> Ran:
    """Run one of our commands to its exit, in this process: starting one takes longer than most of them run.

    Imported here, as one of them reads videos: GPU machines that have nothing to read them with collect these tests.
    """
    main = import_module(MAINS[name]).main
    out, err, handler = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    with (
        mock.patch.dict(os.environ, {"SWIFTI2V_CACHE": str(cache)}),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main([str(argument) for argument in arguments])
    signal.signal(signal.SIGTERM, handler)
    code = ended.value.code
    return Ran(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())
