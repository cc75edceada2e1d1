"""training/device.sh, one phase on a bare machine from packed photographs, on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from swifti2v.engine.weights import load_dit, load_vae
from swifti2v.training.cli import main

SCRIPT = Path(__file__).parents[1] / "training" / "device.sh"


@pytest.mark.slow
def test_phases_on_a_bare_machine(tmp_path: Path, bare: str):
    """A VAE that is fitted, then a DiT on it, which is stopped after a step; nothing larger than weights is left."""
    main(["pack", str(tmp_path / "photos.safetensors"), "--allow-missing"])
    machine = {"PYTHON": sys.executable, "DEVICE": "cpu", "WORKERS": "1", "PYTHONPATH": bare}
    out = tmp_path / "out"
    for phase, options in (("vae1", ["--linear"]), ("stage1", ["--minutes", "0", "--set", "batch=1"])):
        command = ["sh", SCRIPT, tmp_path / "photos.safetensors", out, out, phase, *options, "--threads", "1"]
        ran = subprocess.run(command, env=os.environ | machine, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
    assert load_vae(out / "vae1").config.linear
    assert load_dit(out / "stage1").config.out_channels == load_vae(out / "vae1").config.latent_channels
    names = {path.name for path in out.iterdir()}
    assert names == {"vae1", "vae1.log", "stage1", "stage1.log", "stage1.jsonl", "text"}


@pytest.mark.slow
def test_a_phase_that_fails_says_why(tmp_path: Path):
    command = ["sh", SCRIPT, tmp_path / "none.safetensors", tmp_path, tmp_path / "out", "vae1", "--linear"]
    ran = subprocess.run(
        command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1
    assert "none.safetensors" in ran.stderr
