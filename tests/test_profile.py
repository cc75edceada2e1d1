"""Profiles: the published numbers, overrides, and refusals that name the nearest value that works."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.engine.errors import ProfileError
from swifti2v.engine.presets import PROFILES, get_profile
from swifti2v.engine.profile import size_grid


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_consistent(name: str):
    profile = get_profile(name)
    assert profile.name == name
    assert profile.blocks == (profile.frames - 1) // 4 + 1
    assert profile.concatenated


@pytest.mark.parametrize(
    ("name", "frames", "blocks"), [("wan-2k", 81, 21), ("wan-2k-161", 161, 41), ("wan-2k-241", 241, 61)]
)
def test_wan_profiles(name: str, frames: int, blocks: int):
    profile = get_profile(name)
    assert (profile.stage1.width, profile.stage1.height) == (640, 352)
    assert (profile.width, profile.height) == (2560, 1408)
    assert (profile.frames, profile.blocks) == (frames, blocks)
    assert (profile.stage1.latent_width, profile.stage1.latent_height) == (80, 44)
    assert (profile.stage2.latent_width, profile.stage2.latent_height) == (160, 88)
    assert profile.stage2.block_tokens == 3520
    assert profile.windows == (4, 5)


def test_windows_do_not_depend_on_the_length():
    assert {get_profile(name).windows for name in ("wan-2k", "wan-2k-161", "wan-2k-241")} == {(4, 5)}


def test_overrides():
    profile = get_profile("wan-2k").override(
        frames=41,
        size=(1408, 2560),
        noisy=4,
        neighbours=2,
        stage1_steps=6,
        stage2_steps=2,
        shift=3.0,
        stage2_guidance=3.5,
    )
    assert (profile.stage1.width, profile.stage1.height) == (352, 640)
    assert (profile.frames, profile.noisy, profile.neighbours) == (41, 4, 2)
    assert (profile.stage1.steps, profile.stage2.steps) == (6, 2)
    assert profile.stage1.shift == profile.stage2.shift == 3.0
    assert (profile.stage1.guidance, profile.stage2.guidance) == (1.0, 3.5)
    assert get_profile("wan-2k").override() == get_profile("wan-2k")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 80}, "frames: got 80.*the nearest is 81"),
        ({"frames": 83}, "the nearest is 8"),
        ({"frames": 5}, "at least 13; the nearest is 13"),
        ({"frames": -3}, "the nearest is 13"),
        ({"frames": 4 * 10**15 + 1}, "at most 1,000,001; the nearest is 1000001"),
        ({"frames": 10**30}, "at most 1,000,001; the nearest is 1000001"),
        ({"size": (2000, 1408)}, "multiples of 64; the nearest is 1984x1408"),
        ({"size": (0, 0)}, "the nearest is 64x64"),
        ({"noisy": 0}, "the nearest is 1"),
        ({"neighbours": -1}, "the nearest is 0"),
        ({"neighbours": 9}, "the nearest is 3"),
        ({"stage1_steps": 0}, "steps: got 0"),
        ({"shift": 0.0}, "shift: got 0"),
        ({"shift": float("nan")}, "shift: got nan"),
        ({"shift": 2.0**53}, "want 0.001 to 1000"),
        ({"stage1_guidance": float("inf")}, "guidance: got inf"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict, message: str):
    with pytest.raises(ProfileError, match=message):
        get_profile("wan-2k").override(**changes)


@given(frames=st.integers(-10, 400), width=st.integers(1, 3000), height=st.integers(1, 3000))
def test_the_named_value_is_accepted(frames: int, width: int, height: int):
    profile = get_profile("wan-2k")
    try:
        profile.override(frames=frames)
    except ProfileError as error:
        profile.override(frames=int(str(error).rsplit(" ", 1)[1]))
    try:
        profile.override(size=(width, height))
    except ProfileError as error:
        near_width, near_height = str(error).rsplit(" ", 1)[1].split("x")
        profile.override(size=(int(near_width), int(near_height)))


def test_size_grid_is_whole_tokens_in_both_stages():
    profile = get_profile("nano")
    grid = size_grid(profile)
    small = profile.override(size=(grid, 3 * grid))
    assert small.stage1.latent_width % 2 == small.stage2.latent_height % 2 == 0


def test_a_model_that_cannot_see_the_reference_needs_to_start_from_it():
    profile = get_profile("tiny")
    plain = replace(profile.stage2.dit, in_channels=6)
    with pytest.raises(ProfileError, match="--stage2-init reference"):
        replace(profile, stage2=replace(profile.stage2, dit=plain))
    replace(profile, stage2=replace(profile.stage2, dit=plain), stage2_init="reference", strength=0.6)
    with pytest.raises(ProfileError, match="strength"):
        replace(profile, stage2_init="reference", strength=0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": 0}, "fps: got 0"),
        ({"context": "sideways"}, "context: got 'sideways', want one of both, one-way"),
        ({"positions": "none"}, "want one of absolute, window"),
        ({"stage2_init": "zero"}, "want one of noise, reference"),
        ({"strength": 0.5}, "pass --stage2-init reference"),
    ],
)
def test_modes_that_do_not_exist_are_refused(changes: dict, message: str):
    with pytest.raises(ProfileError, match=message):
        replace(get_profile("tiny"), **changes)


def test_the_size_grid_suits_both_stages_at_any_factor():
    tiny = get_profile("tiny")
    three = replace(
        tiny, stage1=replace(tiny.stage1, width=64, height=64), stage2=replace(tiny.stage2, width=192, height=192)
    )
    assert size_grid(three) == 96
    with pytest.raises(ProfileError, match="multiples of 96; the nearest is 96x192"):
        three.override(size=(64, 192))


def test_explicit_sigmas():
    stage = get_profile("tiny").stage2
    good = replace(stage, sigmas=(1.0, 0.9, 0.5, 0.2))
    assert replace(get_profile("tiny"), stage2=good).stage2.sigmas == (1.0, 0.9, 0.5, 0.2)
    for bad in ((1.0, 0.5), (1.0, 1.0, 0.5, 0.2), (1.0, 0.5, 0.2, 0.0), (2.0, 1.0, 0.5, 0.2)):
        with pytest.raises(ProfileError, match="sigmas"):
            replace(get_profile("tiny"), stage2=replace(stage, sigmas=bad))


def test_unknown_profile():
    with pytest.raises(ProfileError, match="want one of wan-2k"):
        get_profile("wan-4k")
