"""Documents are true: their blocks run, the paths they name exist, the drawn picture is the committed one."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CARD = ROOT / "weights" / "nano" / "README.md"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", CARD, *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = "kernels|engine|runtime|training|benchmarks|export|native|tests|docs|examples|weights"
BLOCK = re.compile(r"^```(bash|python) test\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [(path.name, kind, code) for path in DOCUMENTS for kind, code in BLOCK.findall(path.read_text())]


@pytest.mark.parametrize(("name", "kind", "code"), BLOCKS, ids=[f"{name}-{kind}" for name, kind, _ in BLOCKS])
def test_blocks_run(name: str, kind: str, code: str, tmp_path: Path):
    """As a reader would: in a folder that has examples/, with the installed command."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    if kind == "bash":
        wrapper = tmp_path / "swifti2v"
        wrapper.write_text(
            f'#!/bin/sh\nexec {sys.executable} -c "from swifti2v.runtime.cli import main; main()" "$@"\n'
        )
        wrapper.chmod(0o755)
        command = ["bash", "-euc", f"PATH={tmp_path}:$PATH\n{code}"]
    else:
        command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_readme_has_blocks_to_run():
    assert {kind for name, kind, _ in BLOCKS if name == "README.md"} == {"bash", "python"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_paths_and_links_exist(path: Path):
    text = path.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in link]
    named = re.findall(rf"`((?:{ROOMS})/[\w/.-]*\.\w+)`", text)
    missing = [link for link in links if not (path.parent / link).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_the_picture_is_what_the_planner_says():
    drawn = runpy.run_path(str(ROOT / "docs" / "draw.py"))["draw"]()
    assert (ROOT / "docs" / "pipeline.svg").read_text() == drawn, "run python docs/draw.py"


def test_the_example_writes_every_frame(tmp_path: Path):
    script, photo = ROOT / "examples" / "stream_frames.py", ROOT / "examples" / "photo.jpg"
    command = [sys.executable, str(script), str(photo), str(tmp_path / "out"), "slow zoom in", "tiny"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"{i:04d}.png" for i in range(33)]


def test_the_public_names_exist():
    import swifti2v

    assert all(hasattr(swifti2v, name) for name in swifti2v.__all__)
