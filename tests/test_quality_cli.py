"""`swifti2v-bench quality` as a user meets it: whole processes on tiny untrained models."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from swifti2v.benchmarks.cli import main

BENCH = [sys.executable, "-c", "from swifti2v.benchmarks.cli import main; main()"]
TINY = ["--profile", "tiny", "--dtype", "fp32", "--allow-missing"]
KEYS = {
    "psnr_gain_db", "psnr_db", "bicubic_psnr_db", "true_low_psnr_db", "vae_psnr_db", "vae1_psnr_db", "ssim",
    "transition_psnr_db",
    "bicubic_ssim", "sharpness_over_bicubic", "sharpness_over_truth", "flicker", "dynamic_degree",
    "dynamic_degree_truth", "seam_ratio", "seam_ratio_stage1", "block_pulse", "block_pulse_stage1",
    "first_frame_psnr_db", "first_step_ratio",
    "colour_drift_levels", "colour_drift_stage1_levels", "dynamic_degree_moving", "dynamic_degree_static",
    "prompt_following", "prompt_following_control",
}  # fmt: skip


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*BENCH, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One run that several tests look at."""
    folder = tmp_path_factory.mktemp("quality")
    files = ["--out", folder / "out", "--export-vbench", folder / "vbench", "--json", "--transition-levels", 0.3, 0.75]
    return folder, bench(
        "quality", *TINY, "--untrained", "--clips", 2, "--crops", 2, "--transition-levels", 0.3, 0.75, *files
    )


def test_one_envelope_with_every_key(ran):
    folder, done = ran
    assert done.returncode == 0, done.stderr
    envelope = json.loads(done.stdout)
    assert (envelope["ok"], envelope["exit_code"]) == (True, 0)
    result = envelope["result"]
    assert result.keys() >= KEYS
    for key in KEYS:
        low, high = result[key]["interval"]
        assert low is None or low <= result[key]["mean"] <= high, key
    assert result["psnr_gain_db"]["gate"]["want"] == ">= 2"
    assert result["trained"] is False
    assert result["transition"]["highest"] == 0.75
    assert any("noised to a level of 0.3 to 0.75, and a share of 0.2 only encoded" in note for note in result["notes"])
    assert "UNTRAINED" in result["notes"][0]
    missed = {key for key in KEYS if not result[key].get("gate", {"passed": True})["passed"]}
    assert set(result["gates_missed"]) == missed
    assert missed, "untrained models pass every gate"
    assert json.loads((folder / "out" / "quality.json").read_text()) == result


def test_the_page_needs_no_other_file(ran):
    folder, _ = ran
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["quality.html", "quality.json"]
    page = (folder / "out" / "quality.html").read_text()
    assert "UNTRAINED" in page
    assert re.findall(r'src="(?!data:image/)', page) == []
    assert "://" not in page
    assert page.count('alt="frame"') == 2 * 3 * 4 + 3 * 3 * 3  # truth clips of four columns, generated ones of three
    assert 'class="miss"' in page
    for name in ("input", "Stage I upsampled", "Stage II", "truth"):
        assert f"<th>{name}</th>" in page


def test_vbench_gets_its_files(ran):
    folder, _ = ran
    listed = json.loads((folder / "vbench" / "clips.json").read_text())["clips"]
    assert [clip["prompt"] for clip in listed] == ["camera pans left", "camera pans right", "static shot"]
    for clip in listed:
        assert (folder / "vbench" / clip["video"]).is_file()
        assert (folder / "vbench" / clip["image"]).is_file()
        assert re.sub(r"-\d+\.mp4$", "", clip["video"])[7:] == clip["image"][7:-4]


def test_progress_is_plain_lines_on_stderr(ran):
    _, done = ran
    assert "1/9 photo 1, clip 1" in done.stderr
    assert "9/9 crop 2: control" in done.stderr
    assert "\x1b[" not in done.stderr


def test_untrained_weights_are_refused_unless_asked_for(tmp_path: Path):
    done = bench("quality", *TINY, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert re.match(r"swifti2v-bench: weights of tiny: got none .*, want .*; .*--untrained", done.stderr)
    assert not list(tmp_path.iterdir())


def test_errors_are_one_line_and_an_envelope(tmp_path: Path):
    done = bench("quality", *TINY, "--untrained", "--footage", tmp_path / "none.mp4", "--json")
    assert done.returncode == 1
    envelope = json.loads(done.stdout)
    assert envelope["ok"] is False
    assert "none.mp4" in envelope["error"]
    assert bench("quality", "--clips", "0").returncode == 2


def test_the_table_without_json():
    done = bench("quality", *TINY, "--untrained", "--clips", 1, "--crops", 1, "-q")
    assert done.returncode == 0, done.stderr
    assert "seam ratio" in done.stdout
    assert "miss by" in done.stdout
    assert done.stderr == ""


def test_arguments_that_say_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A comparison without --full would go unused, and on another VAE's latents a DiT knows nothing."""
    shipped = Path(__file__).parents[1] / "weights" / "nano"
    shutil.copytree(shipped, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "vae2")
    shutil.copytree(shipped / "vae1", tmp_path / "other" / "vae2")
    shutil.copytree(shipped, tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed" / "stage2")
    shutil.copytree(shipped / "stage1", tmp_path / "mixed" / "stage2")
    quick = ["quality", "--clips", "1", "--crops", "1", "--allow-missing"]
    for arguments, code, words in (
        (["--compare", f"other={shipped}"], 2, "--compare: got no --full"),
        (["--full", "--compare", "other"], 2, "want NAME=FOLDER"),
        (["--full", "--compare", f"other={tmp_path / 'other'}"], 1, "other: got another VAE of Stage II"),
        (["--full", "--compare", f"other={tmp_path / 'mixed'}"], 1, "other: got a DiT of another size"),
        (["--full", "--compare", f"a={shipped}", "--compare", f"a={shipped}"], 2, "got one NAME twice"),
        (["--transition-levels", "0.5", "0.3"], 2, "--transition-levels: got 0.5 0.3"),
        (["--packed", "photos.safetensors", "--photos-dir", "."], 2, "--packed: got --photos-dir too"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*quick, *arguments])
        assert ended.value.code == code
        assert words in capsys.readouterr().err
