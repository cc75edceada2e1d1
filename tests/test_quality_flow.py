"""Optical flow and the camera move it shows, on clips whose motion is known."""

import numpy as np
import pytest

from swifti2v.benchmarks.optical_flow import STILL, classify, clip_flows, dynamic_degree, fit_camera
from swifti2v.engine.errors import SpecError
from swifti2v.training.clips import Clip, ClipConfig, make_clip
from swifti2v.training.motion import Motion, make_move
from swifti2v.training.prompts import CANONICAL, canonical_motion

SMALL = ClipConfig(width=192, height=128, frames=17, low_factor=2, procedural=1)  # needs no photograph


def moving(motion: Motion, seed: int = 0) -> Clip:
    return make_clip([], seed, SMALL, motion)


@pytest.mark.parametrize("prompt", CANONICAL)
def test_true_clips_are_told_apart(prompt: str):
    # Seed 1 is left out: it draws stripes that look the same after the move, so that no flow can tell.
    for seed in (0, 2, 3, 4):
        assert classify(clip_flows(moving(canonical_motion(prompt), seed).low.numpy(), 4), 4) == prompt, seed


@pytest.mark.parametrize(("speed", "part"), [("slow", 0.3), ("fast", 0.7)])
def test_any_speed_will_do(speed: str, part: float):
    for prompt, kind in CANONICAL.items():
        low = moving(Motion((make_move(kind, speed, part),)), 5).low.numpy()
        assert classify(clip_flows(low, 4), 4) == prompt


def test_a_still_clip_follows_no_prompt():
    low = moving(Motion()).low.numpy()
    flows = clip_flows(low, 4)
    assert classify(flows, 4) == STILL
    assert dynamic_degree(flows, 4) < 0.02


def test_a_pan_to_the_left_moves_the_content_right():
    flow = np.zeros((40, 64, 2))
    flow[..., 0] = 2.0
    assert classify([flow], 4) == "camera pans left"
    assert classify([-flow], 4) == "camera pans right"
    assert classify([flow[..., ::-1]], 4) == "camera pans up"


def test_the_fit_finds_translation_and_divergence_beside_an_object():
    y, x = np.mgrid[0:40, 0:64] - np.array([19.5, 31.5])[:, None, None]
    flow = np.stack((1.5 + 0.03 * x, -0.5 + 0.03 * y), axis=-1)  # [40, 64, 2]
    np.testing.assert_allclose(fit_camera(flow), [1.5, -0.5, 0.03], atol=1e-9)
    flow[5:20, 10:30] = (-9, 7)  # moves on its own
    np.testing.assert_allclose(fit_camera(flow), [1.5, -0.5, 0.03], atol=1e-3)


def test_moves_are_compared_in_the_speed_of_the_basic_ones():
    y, x = np.mgrid[0:40, 0:64] - np.array([19.5, 31.5])[:, None, None]
    # Over 4 frames the basic zoom gives d = 4 * 0.26 / 32, the basic pan 4 * 0.16 * 64 / 32 pixels.
    zoom = 0.0325 * np.stack((x, y), axis=-1)
    pan = np.broadcast_to((1.28, 0.0), (40, 64, 2))
    assert classify([zoom + 0.9 * pan], 4) == "zoom in"
    assert classify([0.9 * zoom + pan], 4) == "camera pans left"
    assert classify([0.05 * pan], 4) == STILL


@pytest.mark.parametrize("prompt", ["camera pans right", "zoom out"])
def test_dynamic_degree_is_that_of_the_known_flow(prompt: str):
    clip = moving(canonical_motion(prompt), 2)
    known = np.hypot(clip.flow[..., 0], clip.flow[..., 1]).mean()
    assert dynamic_degree(clip_flows(clip.low.numpy(), 4), 4) == pytest.approx(known, rel=0.15)


def test_a_clip_too_short_for_flow_is_refused():
    with pytest.raises(SpecError, match=r"flow: got 4 frames, want more than 4; "):
        clip_flows(np.zeros((4, 32, 32, 3), dtype=np.uint8), 4)
