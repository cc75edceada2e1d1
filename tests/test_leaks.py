"""Opening, running, cancelling and closing again and again: the process does not grow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swifti2v.engine.graphs import profile_graphs
from swifti2v.engine.presets import get_profile
from swifti2v.export.build import build_bundle
from swifti2v.export.parity import sample_feed
from swifti2v.runtime.backend_inductor import InductorExecutable
from swifti2v.runtime.backend_weights import open_source

WINDOW = 6  # cycles that are looked at together: two of every kind
LIMIT = 5.0  # MB; half of one is what a hundred cycles were seen to add

CYCLES = """
import ctypes, gc, json, os, sys
from pathlib import Path
import numpy as np
import torch
from swifti2v import Request, Session, get_profile
from swifti2v.engine.errors import Cancelled
from swifti2v.export.build import build_bundle
from swifti2v.runtime.backend_weights import open_source
from swifti2v.runtime.bundle import load_bundle

torch.set_num_threads(1)
backend, folder, warm, cycles = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
profile = get_profile("tiny").override(frames=13, stage1_steps=1, stage2_steps=1, size=(128, 64))
build_bundle(open_source(profile), backend, folder)
image = np.zeros((profile.height, profile.width, 3), np.uint8)


try:
    give_back = ctypes.CDLL(None).malloc_trim
except AttributeError:  # a C library that keeps nothing back
    give_back = lambda _: None


def held():
    gc.collect()
    give_back(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "VmSwap")))
    maps = Path("/proc/self/maps").read_text().count("\\n")
    return [kilobytes * 1024 / 1e6, len(os.listdir("/proc/self/fd")), maps]


def cycle(number):
    with Session.open(load_bundle(folder)) as session:
        if number % 3 == 0:  # stopped by the callback, within Stage II
            try:
                for _ in session.generate(Request(image), lambda progress: progress.phase != "stage2"):
                    raise AssertionError("it went on")
            except Cancelled:
                return
        chunks = session.generate(Request(image))
        next(chunks)
        if number % 3 == 1:  # left where it is, and closed under it
            return
        chunks.close()


seen = []
for number in range(warm + cycles):
    cycle(number)
    seen.append(held())
print(json.dumps(seen))
"""


def grown(backend: str, folder: Path, warm: int, cycles: int) -> tuple[float, int, int]:
    """What a process holds more at the end of the cycles than at the end of the warm-up: MB, open files, mappings.

    Memory of its own counts, in RAM or swapped out: pages of files come and go as the system likes. Before it is read,
    the C library gives back what it keeps for later: 25 to 40 MB with ONNX Runtime, by the kind of the last cycle. Both
    ends are the least of a few cycles of every kind.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    line = [sys.executable, "-c", CYCLES, backend, str(folder), str(warm), str(cycles)]
    ran = subprocess.run(line, capture_output=True, text=True, check=True, env=environment)
    seen = json.loads(ran.stdout)
    print(backend, [round(megabytes) for megabytes, _, _ in seen], seen[warm], seen[-1])
    least = [
        [min(column) for column in zip(*part, strict=True)] for part in (seen[warm - WINDOW : warm], seen[-WINDOW:])
    ]
    (before, *had), (after, *has) = least
    return after - before, has[0] - had[0], has[1] - had[1]


def test_a_few_cycles_leave_nothing(tmp_path: Path):
    """A session has 2 MB of weights and 3 MB of caches, so that one of both staying in every cycle is seen."""
    megabytes, files, maps = grown("eager", tmp_path / "b", WINDOW, 12)
    assert megabytes < LIMIT
    assert files == 0
    assert maps < 10


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_a_hundred_cycles_leave_nothing(tmp_path: Path, backend: str):
    megabytes, files, maps = grown(backend, tmp_path / "b", 20, 100)
    assert megabytes < LIMIT
    assert files == 0
    assert maps < 10


@pytest.mark.slow
def test_packages_of_inductor_are_loaded_once(tmp_path: Path):
    """One graph: compiling is what takes time. A package that is loaded anew leaves six mappings."""
    graph = profile_graphs(get_profile("tiny"), torch.float32)["stage2_text"]
    bundle = build_bundle(open_source(get_profile("tiny")), "inductor", tmp_path / "b", ["stage2_text"])
    feed, held = sample_feed(graph.spec), []
    for _ in range(30):
        executable = InductorExecutable(graph.spec, *bundle.files("stage2_text"))
        executable(feed)
        executable.close()
        held.append(Path("/proc/self/maps").read_text().count("\n"))
    assert held[-1] - held[4] < 10, held
