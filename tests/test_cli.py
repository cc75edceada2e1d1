"""The command line as a user meets it: whole processes, exit codes, one-line errors, nothing half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from swifti2v import get_profile
from swifti2v.engine.weights import FILE_NAME

ROOT = Path(__file__).resolve().parent.parent
PHOTO = ROOT / "examples" / "photo.jpg"
SWIFTI2V = [sys.executable, "-c", "from swifti2v.runtime.cli import main; main()"]
TINY = ["--profile", "tiny", "--dtype", "fp32"]


def swifti2v(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    command = [*SWIFTI2V, *map(str, arguments)]
    options["env"] = options.get("env", os.environ | {"OMP_NUM_THREADS": "1"})
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def assert_one_line(ran: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert ran.returncode == code, ran.stderr
    lines = ran.stderr.strip().splitlines()
    assert len(lines) == 1, ran.stderr
    assert lines[0].startswith("swifti2v: ")
    assert all(word in lines[0] for word in words), lines[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One clip, made once, that several tests look at."""
    folder = tmp_path_factory.mktemp("made")
    sheet = ["--contact-sheet", folder / "clip.png", "--json"]
    return folder, swifti2v(
        "generate", PHOTO, "-o", folder / "clip.mp4", *TINY, "--prompt", "zoom", "--seed", 5, *sheet
    )


def test_generate_writes_clip_record_and_contact_sheet(made):
    folder, ran = made
    assert ran.returncode == 0, ran.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["clip.mp4", "clip.mp4.json", "clip.png"]
    with av.open(folder / "clip.mp4") as file:
        stream = file.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
        assert stream.average_rate == 8
    assert len(frames) == 33
    assert frames[0].shape == (128, 192, 3)
    with Image.open(folder / "clip.png") as sheet:
        assert sheet.width > 500


def test_frame_zero_of_the_file_is_the_photo(made):
    folder, _ = made
    with av.open(folder / "clip.mp4") as file:
        first = next(file.decode(video=0)).to_ndarray(format="rgb24").astype(float)
    with Image.open(PHOTO) as photo:
        width = photo.height * 192 // 128  # cover-crop to 3:2
        left = (photo.width - width) // 2
        fitted = photo.crop((left, 0, left + width, photo.height)).resize((192, 128), Image.Resampling.LANCZOS)
    assert np.abs(first - np.asarray(fitted, dtype=float)).mean() < 4


def test_the_record_says_how_it_was_made(made):
    folder, ran = made
    envelope = json.loads(ran.stdout)
    record = json.loads((folder / "clip.mp4.json").read_text())
    assert envelope == {"ok": True, "exit_code": 0, "result": record}
    assert record["format"] == 1
    assert record["request"]["prompt"] == "zoom"
    assert record["request"]["seed"] == 5
    assert len(record["request"]["image_sha256"]) == 64
    assert record["profile"]["sigmas"]["stage1"] == [1.0, 0.9375, 0.833333, 0.625]
    assert record["weights"] == {"all": "untrained-0"}
    assert {"torch", "swifti2v", "python"} <= record["versions"].keys()
    assert {"loading", "stage1", "reference", "denoise", "decode", "total"} <= record["seconds"].keys()


def test_progress_is_plain_lines_off_a_terminal_and_says_weights_are_untrained(made):
    _, ran = made
    assert "Stage I: step 4 (5/5)" in ran.stderr
    assert "Stage II: segment 3/3, decoded (6/6)" in ran.stderr
    assert "untrained" in ran.stderr
    assert "\x1b[" not in ran.stderr


def test_dry_run_writes_nothing(tmp_path: Path):
    target = tmp_path / "clip.mp4"
    ran = swifti2v("generate", PHOTO, "-o", target, "--profile", "wan-2k-241", "--dry-run", "--json")
    assert ran.returncode == 0, ran.stderr
    plan = json.loads(ran.stdout)["plan"]
    assert plan["weights"] == {"all": "none given"}
    assert (plan["frames"], plan["blocks"], len(plan["segments"])) == (241, 61, 20)
    assert not list(tmp_path.iterdir())


def test_a_portrait_photo_gets_a_hint(tmp_path: Path):
    Image.new("RGB", (600, 1000), "teal").save(tmp_path / "tall.png")
    ran = swifti2v("generate", tmp_path / "tall.png", "-o", tmp_path / "o.mp4", *TINY, "--dry-run")
    assert "--size 128x192 has its shape" in ran.stderr
    again = swifti2v(
        "generate", tmp_path / "tall.png", "-o", tmp_path / "o.mp4", *TINY, "--dry-run", "--size", "128x192"
    )
    assert again.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nothing.jpg", "-o", "o.mp4"], 1, ["no such file"]),
        ([".", "-o", "o.mp4"], 1, ["a folder"]),
        (["text.jpg", "-o", "o.mp4"], 1, ["want a picture format"]),
        (["cut.jpg", "-o", "o.mp4"], 1, ["want a complete, readable image"]),
        (["huge.png", "-o", "o.mp4"], 1, ["89,478,485"]),
        (["photo.png", "-o", "o.avi"], 2, [".mp4"]),
        (["photo.png", "-o", "no/such/folder/o.mp4"], 2, ["no/such/folder"]),
        (["photo.png", "-o", "o.mp4", "--contact-sheet", "sheet.gif"], 2, [".png"]),
        (["photo.png", "-o", "o.mp4", "--frames", "34"], 2, ["the nearest is 33"]),
        (["photo.png", "-o", "o.mp4", "--size", "100x100"], 2, ["multiples of 64", "128x128"]),
        (["photo.png", "-o", "o.mp4", "--size", "big"], 2, ["WIDTHxHEIGHT"]),
        (["photo.png", "-o", "o.mp4", "--seed", "-1"], 2, ["seed"]),
        (["photo.png", "-o", "o.mp4", "--profile", "huge"], 2, ["want one of wan-2k"]),
        (["photo.png", "-o", "o.mp4", "--lora", "x.safetensors"], 2, ["STAGE=PATH"]),
        (["photo.png", "-o", "o.mp4", "--contact-sheet", "photo.png"], 2, ["the input image"]),
        (["photo.png", "-o", "o.mp4", "--stage1-guidance", "nan"], 2, ["guidance: got nan"]),
        (["photo.png", "-o", "o.mp4", "--strength", "0.5"], 2, ["--stage2-init reference"]),
        (["photo.png", "-o", "o.mp4", "--lora", "stage2=photo.png"], 1, ["untrained weights"]),
        (["photo.png", "-o", "o.mp4", "--embeddings", "photo.png"], 1, ["got no stage1"]),
        (["photo.png"], 2, ["--output"]),
        (["photo.png", "-o", "o.mp4", "--device", "cuda:0"], 3, ["--device cpu"]),
        (["photo.png", "-o", "o.mp4", "--device", "gpu"], 2, ["device"]),
        (["photo.png", "-o", "o.mp4", "--profile", "wan-2k"], 1, ["--model-dir"]),
        (["photo.png", "-o", "o.mp4", "--model-dir", "nowhere"], 1, ["nowhere"]),
        (["photo.png", "-o", "o.mp4", "--stage1", "old.pth", "--stage2", "old.pth", "--vae1", "old.pth", "--vae2",
          "old.pth"], 1, ["swifti2v convert"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, arguments: list[str], code: int, words: list[str]):
    if "--device" in arguments and torch.cuda.is_available() and code == 3:
        pytest.skip("this machine has a CUDA device")
    Image.new("RGB", (64, 48), "red").save(tmp_path / "photo.png")
    Image.new("1", (10_500, 9_600)).save(tmp_path / "huge.png")
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "cut.jpg").write_bytes(PHOTO.read_bytes()[:20_000])
    torch.save({"weight": torch.ones(1)}, tmp_path / "old.pth")
    before = sorted(path.name for path in tmp_path.iterdir())
    tiny = [] if "--profile" in arguments else ["--profile", "tiny"]
    ran = swifti2v("generate", *arguments, *tiny, "--quiet", cwd=tmp_path)
    assert_one_line(ran, code, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_errors_are_an_envelope_with_json(tmp_path: Path):
    ran = swifti2v("generate", "nothing.jpg", "-o", tmp_path / "o.mp4", "--json")
    envelope = json.loads(ran.stdout)
    assert envelope["ok"] is False
    assert envelope["exit_code"] == ran.returncode == 1
    assert "no such file" in envelope["error"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_mid_segment_leaves_nothing(tmp_path: Path, number: signal.Signals, code: int):
    command = [*SWIFTI2V, "generate", str(PHOTO), "-o", str(tmp_path / "o.mp4"), *TINY, "--frames", "397"]
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # A shell may have started the tests with SIGINT ignored, which children inherit.
    pipes["preexec_fn"] = lambda: signal.signal(number, signal.SIG_DFL)
    with subprocess.Popen(command, **pipes) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("Stage II: segment 2/"):
                break
        assert [path.suffix for path in tmp_path.iterdir()] == [".part"], "it was writing when the signal came"
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == code
    assert rest.strip().splitlines()[-1].startswith("swifti2v: ")
    assert "Traceback" not in rest
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path):
    """The clip's file may not grow beyond 30 kB, which is where a full disk would stop it too."""
    import resource

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    ran = swifti2v("generate", PHOTO, "-o", tmp_path / "o.mp4", *TINY, "--quiet", preexec_fn=limit, env=environment)
    assert_one_line(ran, 1, "o.mp4", "free space")
    assert not list(tmp_path.iterdir())


def with_nan(state: dict) -> None:
    state["head.head.bias"] = state["head.head.bias"] * float("nan")


def with_wrong_shape(state: dict) -> None:
    state["blocks.0.ffn.2.bias"] = torch.ones(25)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_nan, ["segment 0", "not finite"]),
        (with_wrong_shape, ["blocks.0.ffn.2.bias", "[25]", "[24]"]),
        (lambda state: state.pop("blocks.1.modulation"), ["without tensors", "blocks.1.modulation"]),
        (lambda state: state.update(more=torch.ones(1)), ["unknown tensors", "more"]),
    ],
    ids=["nan", "wrong shape", "missing", "extra"],
)
def test_bad_checkpoints_are_one_line_and_leave_nothing(tmp_path: Path, save_models, change, words: list[str]):
    models = save_models(get_profile("tiny"), tmp_path / "models")
    file = models / "stage2" / FILE_NAME
    state = load_file(file)
    change(state)
    save_file(state, tmp_path / "new")
    (tmp_path / "new").replace(file)
    ran = swifti2v("generate", PHOTO, "-o", tmp_path / "o.mp4", *TINY, "--quiet", "--model-dir", models)
    assert_one_line(ran, 1, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_a_model_folder_makes_a_clip_and_a_foreign_lora_does_not(tmp_path: Path, save_models):
    models = save_models(get_profile("tiny"), tmp_path / "models")
    good = {"diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(96)}
    save_file(good, tmp_path / "good.safetensors")
    save_file(good | {"diffusion_model.blocks.7.ffn.0.diff_b": torch.ones(96)}, tmp_path / "foreign.safetensors")
    command = ["generate", PHOTO, "-o", tmp_path / "o.mp4", *TINY, "--quiet", "--model-dir", models, "--lora"]
    assert_one_line(swifti2v(*command, f"stage2={tmp_path / 'foreign.safetensors'}"), 1, "blocks.7", "foreign")
    ran = swifti2v(*command, f"stage2={tmp_path / 'good.safetensors'}@0.5", "--json")
    assert ran.returncode == 0, ran.stderr
    weights = json.loads(ran.stdout)["result"]["weights"]
    assert weights.keys() == {"stage1", "stage2", "vae1", "vae2", "text", "stage2 + 1. 0.5 * good.safetensors"}


def test_a_file_name_that_is_no_text(tmp_path: Path):
    """As old archives have them; the clip keeps the name, the record says it as far as it can be read."""
    photo, clip = tmp_path / os.fsdecode(b"caf\xe9.jpg"), tmp_path / os.fsdecode(b"\xe9.mp4")
    photo.write_bytes(PHOTO.read_bytes())
    few = ["--frames", 13, "--size", "64x64", "--stage1-steps", 1, "--stage2-steps", 1]
    ran = swifti2v("generate", photo, "-o", clip, *TINY, *few, "--json")
    assert ran.returncode == 0, ran.stderr
    record = json.loads(ran.stdout)["result"]
    assert (record["request"]["source"], record["output"]) == (
        "caf\N{REPLACEMENT CHARACTER}.jpg",
        "\N{REPLACEMENT CHARACTER}.mp4",
    )
    assert json.loads(clip.with_name(clip.name + ".json").read_text(encoding="utf-8")) == record
    assert swifti2v("generate", photo, "-o", clip, *TINY, *few).returncode == 0


def test_an_existing_clip_stays_until_the_new_one_is_whole(tmp_path: Path):
    target = tmp_path / "o.mp4"
    target.write_text("old")
    ran = swifti2v("generate", "nothing.jpg", "-o", target, *TINY)
    assert ran.returncode == 1
    assert target.read_text() == "old"


def test_convert_and_inspect(tmp_path: Path):
    torch.save(
        {"state_dict": {"a.weight": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}}, tmp_path / "m.pth"
    )
    ran = swifti2v("convert", tmp_path / "m.pth")
    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.strip()) == tmp_path / "m.safetensors"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.pth", "m.safetensors", "m.safetensors.manifest.json"]
    facts = json.loads(swifti2v("inspect", tmp_path / "m.safetensors", "--json").stdout)["result"]["m.safetensors"]
    assert facts["kind"] == "unknown"
    assert facts["parameters"] == 10
    assert facts["dtypes"] == {"F32": 1, "BF16": 1}
    assert_one_line(swifti2v("inspect", tmp_path / "m.pth"), 1, "swifti2v convert")
    assert_one_line(swifti2v("inspect", tmp_path / "none"), 1, "none")


def test_inspect_finds_what_is_deeper_in_a_folder_of_models(tmp_path: Path):
    """Two experts in stage1, the encoder beside its tokenizer, a link; as `generate` finds them."""
    models = Path(__file__).parents[1] / "weights" / "nano"
    for place, name in (("stage1/high_noise_model", "stage1"), ("text/text_encoder", "text")):
        shutil.copytree(models / name, tmp_path / place)
    (tmp_path / "text" / "tokenizer").mkdir()
    (tmp_path / "vae2").symlink_to(models / "vae2")
    facts = json.loads(swifti2v("inspect", tmp_path, "--json").stdout)["result"]
    kinds = {name: fact["kind"] for name, fact in facts.items()}
    assert kinds == {"stage1/high_noise_model": "DiT", "text/text_encoder": "unknown", "vae2": "VAE"}
    assert "48 times" in swifti2v("inspect", tmp_path / "vae2").stdout


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path):
    import pickle

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"weight": Evil()}))
    assert_one_line(swifti2v("convert", tmp_path / "evil.pth"), 1, "evil.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pth"]


def test_doctor():
    ran = swifti2v("doctor", "--json")
    assert ran.returncode == 0, ran.stderr
    facts = json.loads(ran.stdout)["result"]
    assert facts["h264"] is True
    assert facts["versions"]["torch"] == torch.__version__


def test_doctor_says_once_what_is_missing(tmp_path: Path):
    (tmp_path / "file").write_text("")
    ran = swifti2v("doctor", "--json", env=os.environ | {"SWIFTI2V_CACHE": str(tmp_path / "file" / "cache")})
    if ran.returncode == 3:
        assert json.loads(ran.stdout)["ok"] is False
        assert len(ran.stderr.strip().splitlines()) == 1


def test_without_arguments_the_help_is_shown():
    ran = swifti2v()
    assert ran.returncode == 2
    assert ran.stderr.startswith("Usage: swifti2v")
    assert ran.stderr.count("\n") > 5


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_result_that_cannot_be_printed_is_one_line():
    with Path("/dev/full").open("w") as full:
        command = [*SWIFTI2V, "generate", str(PHOTO), "-o", "x.mp4", "--dry-run", "--json", "--profile", "tiny"]
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr
    assert "swifti2v: file system: got" in ran.stderr


def test_help_names_every_command():
    ran = swifti2v("--help")
    assert all(name in ran.stdout for name in ("generate", "inspect", "doctor", "convert"))
