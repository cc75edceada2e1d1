"""What clips do to photographs so that a few of them are not learned by heart: turned, recoloured, blended."""

import itertools
from dataclasses import replace

import numpy as np

from swifti2v.training.clips import ClipConfig, make_clip
from swifti2v.training.motion import Motion

STILL = ClipConfig(width=192, height=128, frames=1, procedural=0.0, colour_jitter=0.0, mirror=0.0)


def plain_photo(*colour: int) -> np.ndarray:
    return np.full((200, 300, 3), colour, np.uint8)


def test_channels_are_exchanged():
    photos, config = [plain_photo(10, 100, 200)], replace(STILL, swap=0.9)
    colours = {tuple(make_clip(photos, seed, config, Motion()).frames[0, 0, 0].tolist()) for seed in range(60)}
    assert colours == set(itertools.permutations((10, 100, 200)))


def test_photographs_turn_upside_down():
    darker_above = np.linspace(0, 255, 200, dtype=np.uint8)[:, None, None].repeat(300, 1).repeat(3, 2)
    config = replace(STILL, turn=0.5)
    clips = [make_clip([darker_above], seed, config, Motion()).frames[0].float() for seed in range(40)]
    turned = sum(bool(frame[0].mean() > frame[-1].mean()) for frame in clips)
    assert 10 <= turned <= 30


def test_photographs_are_blended():
    photos, config = [plain_photo(0, 0, 0), plain_photo(200, 200, 200)], replace(STILL, blend=0.5)
    values = [int(make_clip(photos, seed, config, Motion()).frames[0, 0, 0, 0]) for seed in range(60)]
    assert all(value in (0, 200) or 59 <= value <= 141 for value in values)
    assert 20 <= sum(value not in (0, 200) for value in values) <= 40, "half of them, with the other one"
