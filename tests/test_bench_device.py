"""benchmarks/device.sh, the one command for a bare GPU machine, on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run_device(out: Path, *parts: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {
        "PROFILE": "tiny",
        "SMALL": "tiny",
        "DEVICE": "cpu",
        "DTYPE": "fp32",
        "RUNS": "1",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }
    command = ["sh", str(ROOT / "benchmarks" / "device.sh"), str(out), *parts]
    return subprocess.run(command, env=os.environ | settings | environment, capture_output=True, text=True, check=False)


def test_the_gpu_script_runs_anywhere(tmp_path: Path, bare: str):
    done = run_device(tmp_path / "out", "stage2", "peers", "nonsense", PYTHONPATH=bare)
    assert done.returncode == 1
    assert "== stage2: ok" in done.stdout, done.stdout
    assert "== peers: ok" in done.stdout
    assert "got no diffusers" in done.stdout
    assert "== nonsense: FAILED with 2" in done.stdout
    assert "stage2_next" in done.stdout
    records = json.loads((tmp_path / "out" / "records.json").read_text())
    assert {part: (record["case"], record["complete"]) for part, record in records.items()} == {
        "stage2": ("dit-stage2", True)
    }
    assert (tmp_path / "out" / "summary.txt").read_text() == done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"records.json", "log.txt", "summary.txt"}


@pytest.mark.slow
def test_every_part_of_the_gpu_script(tmp_path: Path):
    done = run_device(tmp_path, LENGTHS="33,49")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout


def test_a_part_ends_when_its_time_is_up(tmp_path: Path):
    done = run_device(tmp_path, "clip", PART_SECONDS="1")
    assert done.returncode == 1
    assert "== clip: FAILED with 124" in done.stdout


def test_gpu_tests_are_collected_on_a_bare_machine(tmp_path: Path, bare: str):
    done = run_device(tmp_path / "out", "kernels", DEVICE="cuda", CUDA_VISIBLE_DEVICES="", PYTHONPATH=bare)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "== kernels: ok" in done.stdout, log
    for file in ("test_gpu", "test_inductor_cuda", "test_kernels_gpu"):
        assert f"tests/{file}.py::" in log
