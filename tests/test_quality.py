"""The quality case on tiny untrained models: clips, rows, ablations, footage, the page."""

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from swifti2v.benchmarks.ablations import plan_variants, run_variants, variant_results
from swifti2v.benchmarks.footage import load_footage
from swifti2v.benchmarks.generation import generate, stage_one, transition_motion
from swifti2v.benchmarks.page import render, write_page
from swifti2v.benchmarks.quality import Options, Report, prompt_of, run_quality, work_steps
from swifti2v.benchmarks.quality_clips import photo_crop, shrink, truth_clip, whole_photo
from swifti2v.benchmarks.vbench import VBenchExport
from swifti2v.engine.dit import DiT
from swifti2v.engine.errors import MediaError, ProfileError
from swifti2v.engine.profile import Profile
from swifti2v.runtime.conditioning import Embeddings
from swifti2v.runtime.models import Loaded, untrained_models
from swifti2v.runtime.prompts import GivenPrompts
from swifti2v.runtime.session import Request, Session
from swifti2v.runtime.video import VideoWriter
from swifti2v.training import nano
from swifti2v.training.transition import TransitionConfig


def photo(seed: int, width: int = 260, height: int = 180) -> np.ndarray:
    """Smooth coloured noise, uint8 [height, width, 3]."""
    coarse = torch.rand(1, 3, 9, 13, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return (fine[0].permute(1, 2, 0) * 255).byte().numpy()  # [3, h, w] -> [h, w, 3]


PHOTOS = [photo(1), photo(2), photo(3)]


@pytest.fixture
def short(tiny: Profile) -> Profile:
    return tiny.override(frames=17)  # 5 blocks: segments of 3 and 1


@pytest.fixture
def loaded(short: Profile) -> Loaded:
    return untrained_models(short, torch.float32, torch.device("cpu"))


def test_a_made_clip_is_the_engines_own_and_shows_the_frame_before_the_image(loaded: Loaded):
    image = whole_photo(PHOTOS, loaded.profile, 0)
    request = Request(image, "zoom in", seed=4)
    with Session.open(loaded) as session:
        made = generate(session, request)
        own = np.concatenate([chunk.frames for chunk in session.generate(request)])
    np.testing.assert_array_equal(made.frames, own)
    np.testing.assert_array_equal(made.frames[0], image)
    assert np.abs(made.first.astype(int) - image).max() > 0
    assert made.low.shape == (17, 32, 48, 3)
    assert made.upsampled.shape == made.frames.shape
    assert made.cost.seconds > 0


def test_truth_clips_are_seeded_and_go_through_the_photographs(short: Profile):
    first, again, other = (truth_clip(PHOTOS, short, 0, index) for index in (0, 0, 1))
    np.testing.assert_array_equal(first.frames, again.frames)
    assert first.frames.shape == (17, 128, 192, 3)
    assert first.low.shape == (17, 32, 48, 3)
    np.testing.assert_array_equal(shrink(first.frames, 4), first.low)
    assert first.prompt
    assert (first.name, other.name) == ("photo 1, clip 1", "photo 2, clip 2")
    assert not np.array_equal(first.frames, truth_clip(PHOTOS, short, 1, 0).frames)


def test_the_motion_after_transition_is_seeded_and_near_the_truth(loaded: Loaded):
    one, clip = stage_one(loaded), truth_clip(PHOTOS, loaded.profile, 0, 0)
    motion = transition_motion(one, clip, TransitionConfig())
    assert tuple(motion.shape) == (1, 4, 5, 4, 6)
    torch.testing.assert_close(motion, transition_motion(one, clip, TransitionConfig()), rtol=0, atol=0)
    assert not torch.equal(motion, transition_motion(one, replace(clip, seed=clip.seed + 1), TransitionConfig()))


def test_transition_is_evaluated_as_it_is_trained():
    assert Options().transition == nano.STAGE2.transition


def test_a_stage_one_without_the_word_encoder_is_refused(loaded: Loaded):
    given = GivenPrompts(Embeddings(torch.zeros(1, 8, 16)), "tests")
    with pytest.raises(ProfileError, match=r"quality of tiny: got a Stage I without .*, want .*; pass --profile nano"):
        stage_one(replace(loaded, prompts=given))


def test_crops_are_of_the_photograph_and_differ(short: Profile):
    crops = [photo_crop(PHOTOS, short, 0, index) for index in (0, 3, 6)]
    assert all(crop.shape == (128, 192, 3) for crop in crops)
    assert not np.array_equal(crops[0], crops[1])
    tiny_photo = photo_crop([photo(1, 60, 40)], short, 0, 0)  # smaller than the clip
    assert tiny_photo.shape == (128, 192, 3)


def test_the_case_counts_its_work_and_measures_every_metric(loaded: Loaded):
    done: list[str] = []
    options = Options(clips=1, crops=3)
    footage = [("film.mp4", truth_clip(PHOTOS, loaded.profile, 9, 0).frames)]
    report = run_quality(loaded, PHOTOS, options, footage, done.append)
    assert len(done) == work_steps(options, 1)
    counts = {result.metric.key: result.estimate.count for result in report.results}
    assert counts["psnr_gain_db"] == 1
    assert counts["seam_ratio"] == 2  # the moving and the static one
    assert counts["colour_drift_levels"] == 1
    assert counts["prompt_following"] == counts["prompt_following_control"] == 3
    assert all(np.isfinite(result.estimate.value) for result in report.results)
    assert {result.estimate.count for result in report.footage} == {1}
    assert not any(result.verdict for result in report.footage)
    assert sum(sum(row.values()) for row in report.details["control_seen_as"].values()) == 3
    assert not report.ablations
    (drawn, film) = report.details["truth_clips"]
    assert (drawn["name"], film["name"], film["prompt"]) == ("photo 1, clip 1", "film.mp4", "")
    gain = report.results[0].estimate.value
    assert drawn["stage2_psnr_db"] - drawn["bicubic_psnr_db"] == pytest.approx(gain)
    assert [t for t, _ in report.panels[0].columns["truth"]] == [0, 8, 16]
    assert [t for t, _ in report.panels[0].columns["input"]] == [0, 0, 0]


def test_variants_are_what_the_profile_allows(short: Profile, tiny: Profile):
    names = [variant.name for variant in plan_variants(tiny)]
    assert names == [
        "default", "context one-way", "N = 0", "N = 2", "M = 1", "M = 5", "context reused", "reference off",
        "full sequence", "16 steps",
    ]  # fmt: skip
    assert not any(variant.refused for variant in plan_variants(tiny))
    refused = {variant.name: variant.refused for variant in plan_variants(short) if variant.refused}
    assert set(refused) == {"M = 5", "N = 2"}
    *_, full, _ = (variant.profile for variant in plan_variants(tiny))
    assert full is not None
    assert full.windows == (9,)


def test_variants_run_on_the_same_clip_and_differ(loaded: Loaded):
    other = DiT(loaded.profile.stage2.dit).eval()
    variants = plan_variants(loaded.profile, {"other": other, "itself": loaded.modules["stage2"]})
    clip = truth_clip(PHOTOS, loaded.profile, 0, 0)
    motion = transition_motion(stage_one(loaded), clip, TransitionConfig())
    run_variants(loaded, variants, clip, motion)
    results = {item.name: item for item in variant_results(variants, 0)}
    assert results["default"].values["psnr_change_db"][0] == 0
    change = {name: item.values["psnr_change_db"][0] for name, item in results.items() if not item.refused}
    assert change.pop("default") == change.pop("itself") == 0
    assert all(change.values())
    assert np.isnan(results["full sequence"].values["seam_ratio"][0])  # it has no seams
    assert results["M = 5"].as_json().keys() == {"name", "refused"}
    assert results["default"].as_json()["seconds"]["mean"] > 0


def numbered_video(path: Path, count: int, fps: int, size: tuple[int, int] = (96, 64)) -> Path:
    """A video whose frame k is grey level 5 k."""
    with VideoWriter(path, *size, fps) as writer:
        for k in range(count):
            writer.write(np.full((1, size[1], size[0], 3), 5 * k, dtype=np.uint8))
    return path


def test_footage_is_taken_at_the_clips_rate(short: Profile, tmp_path: Path):
    frames = load_footage(numbered_video(tmp_path / "fast.mp4", 50, 24), short)  # the profile has 8 a second
    assert frames.shape == (17, 128, 192, 3)
    assert np.abs(frames.mean((1, 2, 3)) - np.arange(17) * 15).max() < 4
    slow = load_footage(numbered_video(tmp_path / "slow.mp4", 17, 5), short)  # slower: every frame, once
    assert np.abs(slow.mean((1, 2, 3)) - np.arange(17) * 5).max() < 4


def test_footage_is_cropped_and_not_stretched(short: Profile, tmp_path: Path):
    picture = np.zeros((1, 64, 192, 3), dtype=np.uint8)
    picture[:, :, 48:144] = 200  # the middle 96 columns are what a 3:2 crop keeps
    with VideoWriter(tmp_path / "wide.mp4", 192, 64, 8) as writer:
        for _ in range(17):
            writer.write(picture)
    frames = load_footage(tmp_path / "wide.mp4", short)
    assert frames[:, :, 10:-10].min() > 190


def test_footage_that_cannot_serve_is_refused(short: Profile, tmp_path: Path):
    with pytest.raises(MediaError, match=r"footage .*short\.mp4: got 16 frames at 8 a second, want 17; "):
        load_footage(numbered_video(tmp_path / "short.mp4", 48, 24), short)
    with pytest.raises(MediaError, match=r"footage .*: got no file, want a video; "):
        load_footage(tmp_path / "none.mp4", short)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(MediaError, match=r"footage .*text\.mp4: got '.*', want a readable video; "):
        load_footage(tmp_path / "text.mp4", short)
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44100
        file.mux([*stream.encode(silence), *stream.encode(None)])
    with pytest.raises(MediaError, match=r"sound\.mp4: got no video stream, want one; "):
        load_footage(tmp_path / "sound.mp4", short)


def test_vbench_files_share_names_and_keep_no_old_ones(tmp_path: Path):
    export = VBenchExport(tmp_path / "v", 8)
    image, frames = photo(1, 64, 48), np.zeros((3, 48, 64, 3), dtype=np.uint8)
    for prompt in ("camera pans up", "camera pans up", "static shot"):
        export(1, prompt, image, frames)
    export.finish()
    videos = sorted(path.name for path in (tmp_path / "v" / "videos").iterdir())
    images = sorted(path.name for path in (tmp_path / "v" / "images").iterdir())
    assert videos == [
        "photo 1, camera static-0.mp4",
        "photo 1, camera tilts up-0.mp4",
        "photo 1, camera tilts up-1.mp4",
    ]
    assert images == ["photo 1, camera static.jpg", "photo 1, camera tilts up.jpg"]
    with pytest.raises(MediaError, match=r"got files in it, want an empty folder; "):
        VBenchExport(tmp_path / "v", 8)


def test_the_page_escapes_what_it_is_told(tmp_path: Path):
    report = Report(notes=["a < b & <script>alert(1)</script>"])
    text = render("<b>title</b>", ["<i>fact</i>"], report)
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "<b>title" not in text
    assert "<i>fact" not in text
    write_page(tmp_path / "page.html", "title", [], report)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(MediaError, match=r"page .*: got '.*', want a writable file; "):
        write_page(tmp_path / "none" / "page.html", "title", [], report)


def test_every_photograph_meets_every_prompt():
    """With eight photographs and six prompts, a step of nine in turn would be one of three."""
    prompts = [[prompt_of(index, count) for index in range(6 * count)] for count in (3, 5, 8)]
    for count, asked in zip((3, 5, 8), prompts, strict=True):
        for photograph in range(count):
            assert len(set(asked[photograph::count])) == 6
