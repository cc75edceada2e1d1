"""Segments: every block made once and in order, windows of fixed length, context always final."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.engine.errors import ProfileError
from swifti2v.engine.segments import plan_segments

CLIPS = [33, 81, 161, 241]


def check(blocks: int, noisy: int, neighbours: int) -> None:
    segments = plan_segments(blocks, noisy, neighbours)
    made = [0]
    for index, segment in enumerate(segments):
        assert segment.index == index
        assert segment.anchor == 0
        assert set(segment.context) < set(made) or not segment.context
        assert segment.noisy[0] == made[-1] + 1
        assert list(segment.window) == sorted(set(segment.window)), "ascending, nothing twice"
        assert len(segment.window) == (1 + noisy if index == 0 else 1 + neighbours + noisy)
        if segment.context:
            assert segment.context == tuple(range(segment.context[0], segment.noisy[0])), "neighbours are the nearest"
        made += segment.noisy
    assert made == list(range(blocks))
    assert all(len(segment.noisy) == noisy for segment in segments[:-1]), "only the last may be short"


@pytest.mark.parametrize("frames", CLIPS)
def test_published_lengths(frames: int):
    check((frames - 1) // 4 + 1, 3, 1)


def test_default_plan_of_81_frames():
    segments = plan_segments(21)
    assert len(segments) == 7
    assert segments[0].window == (0, 1, 2, 3)
    assert segments[1].window == (0, 3, 4, 5, 6)
    # 20 blocks are not a multiple of 3: the last window makes 2 and holds one clean block more.
    assert segments[-1].context == (17, 18)
    assert segments[-1].noisy == (19, 20)


@given(blocks=st.integers(2, 80), noisy=st.integers(1, 80), neighbours=st.integers(0, 6))
def test_any_plan_is_whole_or_refused(blocks: int, noisy: int, neighbours: int):
    short = (blocks - 1 - noisy) % noisy or noisy
    most = short if blocks <= 1 + 2 * noisy else noisy
    if blocks < 1 + noisy or (blocks > 1 + noisy and neighbours > most):
        with pytest.raises(ProfileError, match="the nearest is"):
            plan_segments(blocks, noisy, neighbours)
    else:
        check(blocks, noisy, neighbours)


@given(blocks=st.integers(2, 80), noisy=st.integers(1, 20), neighbours=st.integers(0, 20))
def test_the_nearest_it_names_works(blocks: int, noisy: int, neighbours: int):
    for _ in range(3):
        try:
            check(blocks, noisy, neighbours)
            return
        except ProfileError as error:
            nearest = int(str(error).rsplit(" ", 1)[1])
            blocks, neighbours = (nearest, neighbours) if str(error).startswith("blocks") else (blocks, nearest)
    check(blocks, noisy, neighbours)


def test_full_sequence_is_one_segment():
    (segment,) = plan_segments(21, noisy=20)
    assert segment.window == tuple(range(21))


@pytest.mark.parametrize(("blocks", "noisy"), [(3, 3), (1, 1), (0, 1)])
def test_short_clips_are_refused(blocks: int, noisy: int):
    with pytest.raises(ProfileError, match="want at least"):
        plan_segments(blocks, noisy)
