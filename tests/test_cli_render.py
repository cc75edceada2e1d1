"""`swifti2v render` and the frame formats of `generate` as a farm meets them; Open Job Description's own runner."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from farm_support import PHOTO
from PIL import Image

from swifti2v.runtime.cli import main
from swifti2v.runtime.farm_lock import ShotLock

ROOT = Path(__file__).resolve().parent.parent
SWIFTI2V = [sys.executable, "-c", "from swifti2v.runtime.cli import main; main()"]
TINY = ["--profile", "tiny", "--size", "64x64", "--dtype", "fp32"]
PLAIN = os.environ | {"OMP_NUM_THREADS": "1"}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def swifti2v(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the command line in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("SWIFTI2V_CACHE", str(tmp_path / "cache"))
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """A list of three shots, the second of which has no image."""
    shutil.copy(PHOTO, tmp_path / "photo.jpg")
    items = [
        {"name": "a", "image": "photo.jpg", "prompt": "zoom"},
        {"name": "bad", "image": "none.jpg"},
        {"name": "c", "image": "photo.jpg", "seed": 4},
    ]
    path = tmp_path / "shots.json"
    path.write_text(json.dumps({"shots": items}))
    return path


def test_a_list_becomes_folders(swifti2v: Run, shots: Path, tmp_path: Path):
    job = tmp_path / "job"
    code, out, err = swifti2v("render", shots, "-o", job, *TINY, "--progress", "json")
    assert code == 4, "one shot failed, and the others did not wait for it"
    assert out.splitlines() == [f"done     {job / 'a'}", f"failed   {job / 'bad'}", f"done     {job / 'c'}"]
    assert "swifti2v: bad: image" in err
    news = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert [item["event"] for item in news if item["event"] in ("done", "failed")] == ["done", "failed", "done"]
    with av.open(job / "a" / "a.mp4") as file:
        assert sum(1 for _ in file.decode(video=0)) == 33
        assert file.streams.video[0].average_rate == 8
    before = (job / "a" / "a.mp4").stat().st_mtime_ns
    code, out, _ = swifti2v("render", shots, "-o", job, *TINY, "--select", "a,c", "--json", "-q")
    assert code == 0
    assert [shot["status"] for shot in json.loads(out)["result"]["shots"]] == ["skipped", "skipped"]
    assert (job / "a" / "a.mp4").stat().st_mtime_ns == before
    code, out, _ = swifti2v("render", shots, "-o", job, *TINY, "--dry-run", "--json")
    assert code == 4
    plan = json.loads(out)["plan"]
    assert (plan["shots"]["a"], plan["format"]) == ("finished", "mp4")
    assert plan["shots"]["bad"].startswith("refused: image")


def test_lines_for_open_job_description(swifti2v: Run, shots: Path, tmp_path: Path):
    code, out, _ = swifti2v("render", shots, "-o", tmp_path / "job", *TINY, "--index", "0-1", "--progress", "openjd")
    assert code == 4
    lines = out.splitlines()
    progress = [float(line.split()[1]) for line in lines if line.startswith("openjd_progress: ")]
    assert progress == sorted(progress)
    assert progress[-1] == 100
    assert "openjd_status: a: segment 2/3, step 4" in lines
    assert any(line.startswith("openjd_fail: bad: failed image") for line in lines)


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--kernels", "fused"], "fused kernels: got device cpu"), (["--cuda-graphs"], "CUDA graphs: got device cpu")],
)
@pytest.mark.parametrize("command", ["generate", "render"])
def test_what_a_gpu_is_needed_for_is_refused_on_a_cpu(
    swifti2v: Run, shots: Path, tmp_path: Path, command: str, options: list[str], words: str
):
    what, output = (PHOTO, tmp_path / "o.mp4") if command == "generate" else (shots, tmp_path / "job")
    for dry in ([], ["--dry-run"]):
        code, out, err = swifti2v(command, what, "-o", output, *TINY, "--device", "cpu", *options, *dry)
        assert (code, out, len(err.strip().splitlines())) == (3, "", 1)
        assert err.startswith(f"swifti2v: {words}, want cuda; run with")
    assert not output.exists()


def test_a_plan_says_which_kernels(swifti2v: Run, tmp_path: Path):
    plan = ["generate", PHOTO, "-o", tmp_path / "o.mp4", *TINY, "--device", "cpu", "--dry-run", "--json"]
    for options in ([], ["--kernels", "eager", "--no-cuda-graphs"]):
        made = json.loads(swifti2v(*plan, *options)[1])["plan"]
        assert (made["kernels"], made["cuda_graphs"]) == ("eager", False)


def test_a_dry_run_writes_nothing(swifti2v: Run, shots: Path, tmp_path: Path):
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = swifti2v("render", shots, "-o", tmp_path / "job", *TINY, "--select", "a", "--dry-run")
    assert code == 0
    assert "a            new" in out.splitlines()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_shot_that_another_worker_has_is_for_later(swifti2v: Run, shots: Path, tmp_path: Path):
    job = tmp_path / "job"
    assert swifti2v("render", shots, "-o", job, *TINY, "--select", "a", "-q")[0] == 0
    (job / "c").mkdir()
    with ShotLock.take(job / "c" / "lock") or pytest.fail("nobody has it"):
        code, out, err = swifti2v("render", shots, "-o", job, *TINY, "--select", "a,c", "-q")
        assert code == 75
        assert out.splitlines() == [f"skipped  {job / 'a'}", f"busy     {job / 'c'}"]
        assert "run it again" in err
        out = swifti2v("render", shots, "-o", job, *TINY, "--select", "c", "--dry-run")[1]
        assert "c            new, held by another worker" in out.splitlines()


def test_another_kind_of_job_is_refused(swifti2v: Run, shots: Path, tmp_path: Path):
    render = ["render", shots, "-o", tmp_path / "job", *TINY, "--select", "a", "-q"]
    assert swifti2v(*render)[0] == 0
    code, _, err = swifti2v(*render, "--format", "png")
    assert code == 1
    assert "output: got format 'png' in place of 'mp4'" in err
    code, _, err = swifti2v(*render[:-2], "c", "-q", "--dtype", "bf16")
    assert code == 3
    assert "--allow-different" in err
    assert swifti2v(*render[:-2], "c", "-q", "--dtype", "bf16", "--allow-different")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.json", "-o", "job"], "want a readable shot list"),
        (["bad.json", "-o", "job"], r"missing \['image'\]"),
        (["shots.json", "-o", "job", "--select", "z"], "--select: got 'z'"),
        (["shots.json", "-o", "job", "--index", "3"], "--index: got '3'"),
        (["shots.json", "-o", "job", "--shard", "0/2"], "want I/N"),
        (["shots.json", "-o", "job", "--shard", "3/2"], "want I/N"),
        (["shots.json", "-o", "no/such/job"], "create it first"),
        (["shots.json", "-o", "job", "--colour", "acescg"], "write .exr for it"),
        (["shots.json", "-o", "job", "--state-every", "0"], "--state-every"),
    ],
)
def test_wrong_options_are_one_line(
    swifti2v: Run, shots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
):
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text('{"shots": [{"name": "a"}]}')
    code, out, err = swifti2v("render", *arguments, *TINY)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert re.search(words, err)
    assert not Path("job").exists()


def test_a_signal_leaves_a_folder_that_resumes(swifti2v: Run, shots: Path, tmp_path: Path):
    job = tmp_path / "job"
    command = [*SWIFTI2V, "render", str(shots), "-o", str(job), *TINY, "--format", "png", "--select", "a"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=PLAIN) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("a: segment 1/"):
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert process.returncode == 143, rest
    assert rest.splitlines()[-1] == "swifti2v: terminated"
    assert not list(job.rglob("*.part"))
    assert not (job / "a" / "lock").exists()
    before = {path: path.stat().st_mtime_ns for path in job.rglob("*.png")}
    assert len(before) >= 13
    code, _, err = swifti2v("render", shots, "-o", job, *TINY, "--format", "png", "--select", "a")
    assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(job.rglob("*.png"))) == 33


def test_generate_writes_numbered_files(swifti2v: Run, tmp_path: Path):
    code, out, err = swifti2v(
        "generate", PHOTO, "-o", tmp_path / "shot.####.png", *TINY, "-q", "--seed", 5, "--first-frame", 1
    )
    assert code == 0, err
    assert out.strip() == str(tmp_path / "shot.####.png")
    assert sorted(p.name for p in tmp_path.glob("*.png")) == [f"shot.{number:04d}.png" for number in range(1, 34)]
    record = json.loads((tmp_path / "shot.json").read_text())
    assert (record["output"], record["request"]["seed"]) == ("shot.####.png", 5)
    with Image.open(tmp_path / "shot.0002.png") as image:
        assert image.info["swifti2v/seed"] == "5"


def test_generate_writes_float_frames(swifti2v: Run, tmp_path: Path):
    openexr = pytest.importorskip("OpenEXR")
    code, _, err = swifti2v("generate", PHOTO, "-o", tmp_path / "shot.####.exr", *TINY, "-q", "--colour", "acescg")
    assert code == 0, err
    files = sorted(tmp_path.glob("*.exr"))
    assert [files[0].name, files[-1].name, len(files)] == ["shot.1001.exr", "shot.1033.exr", 33]
    file = openexr.File(str(files[5]))
    assert file.header()["colorInteropID"] == "lin_ap1_scene"
    assert file.header()["framesPerSecond"] == 8
    assert len(np.unique(file.channels()["RGB"].pixels[..., 0])) > 256, "more levels than 8 bits have"


def test_generate_writes_to_a_pipe():
    command = [*SWIFTI2V, "generate", str(PHOTO), "-o", "-", *TINY, "-q", "--chroma", "444"]
    ran = subprocess.run(command, capture_output=True, check=False, env=PLAIN)
    assert ran.returncode == 0, ran.stderr
    with av.open(io.BytesIO(ran.stdout), format="yuv4mpegpipe") as file:
        stream = file.streams.video[0]
        assert (stream.average_rate, stream.codec_context.pix_fmt) == (Fraction(8), "yuv444p")
        assert [(frame.width, frame.height) for frame in file.decode(stream)] == [(64, 64)] * 33


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "frame.png"], "one number such as shot.####.png"),
        (["-o", "no/####.png"], "create it first"),
        (["-o", "a.####.png", "--colour", "acescg"], "write .exr for it"),
        (["-o", "a.mp4", "--colour", "lin_rec709"], "write .exr for it"),
        (["-o", "-", "--json"], "want stdout for one of them"),
        (["-o", "p.####.png"], "the input image"),
    ],
)
def test_targets_that_are_refused(
    swifti2v: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save("p.1005.png")
    code, _, err = swifti2v("generate", "p.1005.png", *arguments, *TINY)
    assert code == 2
    assert words in err
    assert [path.name for path in tmp_path.iterdir()] == ["p.1005.png"]


def test_open_job_description_runs_the_template(tmp_path: Path, shots: Path):
    """Three shots in chunks of two: two processes. A prompt full of shell is only a prompt."""
    openjd = Path(sys.executable).with_name("openjd")
    if not openjd.exists():
        pytest.skip("openjd is not installed: pip install 'swifti2v[farm]'")
    prompt = f"zoom; $(touch {tmp_path}/ran) `touch {tmp_path}/ran` \"'&|"
    items = [{"name": name, "image": "photo.jpg", "prompt": prompt} for name in "abc"]
    shots.write_text(json.dumps({"shots": items}))
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "swifti2v"
    command.write_text(f'#!/bin/sh\nexec {SWIFTI2V[0]} -c "{SWIFTI2V[2]}" "$@"\n')
    command.chmod(0o755)
    template = ROOT / "examples" / "openjd" / "template_chunk.yaml"
    values = {"ShotList": shots, "JobFolder": tmp_path / "job", "Shots": "0-2", "ShotsPerChunk": 2, "Profile": "tiny"}
    parameters = [part for name, value in values.items() for part in ("-p", f"{name}={value}")]
    parameters += ["-p", "Format=png"]
    environment = PLAIN | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SWIFTI2V_CACHE": str(tmp_path / "x")}
    checked = subprocess.run([openjd, "check", template], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    ran = subprocess.run(
        [openjd, "run", template, *parameters], capture_output=True, text=True, check=False, env=environment
    )
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert "Chunks run: 2" in ran.stdout
    assert "openjd_progress: 100.0" in ran.stdout or "Progress: 100.0" in ran.stdout
    assert [len(list((tmp_path / "job" / name).glob(f"{name}.*.png"))) for name in "abc"] == [33, 33, 33]
    assert not (tmp_path / "ran").exists()
