"""Batches for training: equal arguments give equal samples, pieces lie inside their clips, pools grow as promised."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from swifti2v.training.batches import Crops, Cuts, Pool, clip_batch, joined, mixed, stored
from swifti2v.training.clips import ClipConfig, ClipError
from swifti2v.training.drawing import AHEAD, Drawer
from swifti2v.training.flow import ClipBatch, LatentBatch
from swifti2v.training.log import TrainingError

CLIPS = ClipConfig(width=192, height=128, frames=9)


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    draws = np.random.default_rng(0)
    return [draws.integers(0, 256, (200, 300, 3), dtype=np.uint8) for _ in range(2)]


def drawn(photos: list[np.ndarray], crops: Crops, seed: int, workers: int = 0) -> ClipBatch:
    drawer = Drawer(photos, workers)
    try:
        return clip_batch(drawer.ahead(CLIPS, lambda index: crops.places(CLIPS, index))(seed), "cpu")
    finally:
        drawer.close()


def test_a_batch_is_a_function_of_its_seed(photos):
    crops = Crops(2, 64, 32)
    batch, again, other = drawn(photos, crops, 5), drawn(photos, crops, 5), drawn(photos, crops, 6)
    assert batch.high.shape == (2, 3, 9, 32, 64)
    assert batch.low.shape == (2, 3, 9, 8, 16)
    assert batch.high.min() >= -1
    assert batch.high.max() <= 1
    assert torch.equal(batch.high, again.high)
    assert list(batch.prompts) == list(again.prompts)
    assert not torch.equal(batch.high, other.high)
    assert not torch.equal(batch.high[0], batch.high[1])
    shrunk = batch.high.unflatten(4, (-1, 4)).unflatten(3, (-1, 4)).mean(dim=(4, 6))  # [.., 32, 64] -> [.., 8, 16]
    assert (shrunk - batch.low).abs().max() < 1 / 127, "low is the mean of 4x4 pixels of high"


def test_other_processes_draw_the_same_clips_in_order(photos):
    crops, asked = Crops(2, 64, 32), list[int]()
    drawer = Drawer(photos, 2)
    try:
        ahead = drawer.ahead(CLIPS, lambda index: asked.append(index) or crops.places(CLIPS, index))
        first = clip_batch(ahead(0), "cpu")
        assert asked == list(range(1 + AHEAD)), "later ones are being drawn"
        batches = [first, *(clip_batch(ahead(index), "cpu") for index in (1, 2))]
    finally:
        drawer.close()
    for index, batch in enumerate(batches):
        here = drawn(photos, crops, index)
        assert torch.equal(batch.high, here.high)
        assert torch.equal(batch.low, here.low)
        assert batch.prompts == here.prompts
        torch.testing.assert_close(batch.origin, here.origin, rtol=0, atol=0, equal_nan=True)


def test_processes_that_draw_end_with_their_owner(tmp_path: Path):
    script = tmp_path / "owner.py"
    script.write_text("""
import os, signal
import numpy as np
from swifti2v.training.clips import ClipConfig
from swifti2v.training.drawing import Crop, Drawer
if __name__ == "__main__":
    drawer = Drawer([np.zeros((200, 300, 3), np.uint8)], 1)
    drawer.ahead(ClipConfig(width=64, height=32, frames=1), lambda index: [Crop(index, (0, 0, 64, 32))])(0)
    print(*drawer._pool._processes, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
""")
    with (tmp_path / "out").open("w") as out:
        ran = subprocess.run([sys.executable, script], stdout=out, timeout=60, check=False)
    assert ran.returncode == -signal.SIGKILL
    process = int((tmp_path / "out").read_text())
    for _ in range(100):
        if not Path(f"/proc/{process}").exists():
            return
        time.sleep(0.1)
    pytest.fail(f"process {process} is still there")


def test_a_wrong_number_of_processes_and_a_lost_one_are_refused(photos):
    with pytest.raises(TrainingError, match="--workers: got -1, want 0 or more"):
        Drawer(photos, -1)
    drawer = Drawer(photos, 1)
    try:
        ahead = drawer.ahead(CLIPS, lambda index: Crops(1, 64, 32).places(CLIPS, index))
        ahead(0)
        assert drawer._pool is not None
        for process in list(drawer._pool._processes):
            os.kill(process, signal.SIGKILL)
        with pytest.raises(TrainingError, match="got a process that is gone"):
            [ahead(index) for index in range(1, 9)]
    finally:
        drawer.close()


def test_a_crop_larger_than_the_picture_is_refused(photos):
    with pytest.raises((ClipError, RuntimeError)):
        drawn(photos, Crops(1, 256, 32), 0)


def test_cuts_are_pieces_of_their_clip_from_anywhere():
    t, y, x = torch.meshgrid(torch.arange(9), torch.arange(16), torch.arange(24), indexing="ij")
    clip = (t * 10000 + y * 100 + x).float().expand(1, 3, -1, -1, -1)
    corners = set()
    for seed in range(200):
        piece = Cuts(1, 8, 5).take([clip], seed)
        assert piece.shape == (1, 3, 5, 8, 8)
        corner = piece[0, 0, 0, 0, 0]
        assert torch.equal(piece[0, 0] - corner, (t * 10000 + y * 100 + x)[:5, :8, :8].float())
        corners.add(int(corner))
    starts = {value // 10000 for value in corners}, {value // 100 % 100 for value in corners}
    assert starts == (set(range(5)), set(range(9))), "every start is drawn, the last ones too"


def test_a_pool_makes_each_sample_once_and_moves_on():
    made: list[int] = []

    def make(index: int) -> list[int]:
        made.append(index)
        return [index]

    pool = Pool(make, count=4, window=6, reuse=2.0, steps=40)
    steps = [pool(step, step) for step in range(40)]
    assert all(len(step) == 4 for step in steps)
    assert all(2 * index <= min(step) and max(step) < 2 * index + 6 for index, step in enumerate(steps))
    assert made == list(range(len(made))), "in order, each once"
    assert max(made) < 2 * 39 + 6, "none for steps that never come"
    uses = [sum(step.count(index) for step in steps) for index in range(10, 70)]
    assert 1.5 < sum(uses) / len(uses) < 2.5, "as often as promised"
    assert len(pool._made) <= 6, "what no step draws again is forgotten"


def test_a_resumed_pool_draws_the_same_and_makes_the_window_alone():
    whole = Pool(lambda index: [index], count=4, window=6, reuse=2.0, steps=40)
    steps = [whole(step, step) for step in range(40)]
    made: list[int] = []
    resumed = Pool(lambda index: made.append(index) or [index], count=4, window=6, reuse=2.0, steps=40)
    assert [resumed(step, step) for step in range(20, 40)] == steps[20:]
    assert min(made) == 40


def test_a_pool_of_a_share_of_the_steps_moves_on_more_slowly():
    pool = Pool(lambda index: [index], count=4, window=6, reuse=2.0, steps=100, share=0.25)
    assert pool.window(40) == range(20, 26)
    assert [len(pool.window(step)) for step in range(6)] == [2, 3, 4, 5, 6, 6], "no step waits for a whole window"
    short = Pool(lambda index: [index], count=4, window=64, reuse=2.0, steps=2)
    assert short.window(50) == short.window(1), "nothing for steps that never come"


def test_a_pool_of_groups_draws_all_their_members():
    made: list[int] = []
    make = lambda index: made.append(index) or [3 * index, 3 * index + 1, 3 * index + 2]  # noqa: E731
    pool = Pool(make, count=4, window=6, reuse=2.0, steps=60, group=3)
    steps = [pool(step, step) for step in range(60)]
    assert all(2 * index - 2 <= min(step) and max(step) < 2 * index + 6 for index, step in enumerate(steps))
    assert made == list(range(len(made))), "in order, each once"
    uses = [sum(step.count(sample) for step in steps) for sample in range(10, 100)]
    assert 1.5 < sum(uses) / len(uses) < 2.5, "as often as promised"


def test_a_sample_that_fails_fails_the_step():
    def make(index: int) -> list[int]:
        raise ValueError(f"sample {index}")

    pool = Pool(make, count=1, window=1, reuse=1.0, steps=9)
    for _ in range(2):
        with pytest.raises(ValueError, match="sample 0"):
            pool(0, 0)


def test_a_pool_at_work_does_not_hold_up_the_end():
    script = """
import time
from swifti2v.training.batches import Pool
pool = Pool(lambda index: time.sleep(0.5 if index else 0) or [index], count=1, window=1, reuse=0.01, steps=1000)
assert pool(0, 0) == [0]
"""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    assert time.monotonic() - started < 20


def test_mixed_batches_keep_their_shares():
    make = mixed([lambda step, seed: "a", lambda step, seed: "b"], [0.75, 0.25])
    drawn = [make(step, step) for step in range(400)]
    assert 0.68 < drawn.count("a") / 400 < 0.82
    assert [make(step, step) for step in range(400)] == drawn


def test_joined_samples_keep_their_order():
    values = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1, 1)
    places = 100.1 * values.expand(2, 3, 2, 2, 2)
    batch = LatentBatch(values.expand(2, 2, 3, 4, 4), -values.expand(2, 1, 3, 4, 4), ["1", "2"], places=places)
    samples = stored(batch, "cpu")
    assert [tuple(sample.latents.shape) for sample in samples] == [(1, 2, 3, 4, 4)] * 2
    assert samples[0].latents.dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        batch = joined(samples, "cpu")
    assert batch.latents.dtype == torch.float32
    assert batch.latents[:, 0, 0, 0, 0].tolist() == [1, 2]
    assert batch.channels[:, 0, 0, 0, 0].tolist() == [-1, -2]
    assert list(batch.prompts) == ["1", "2"]
    assert batch.places is not None
    assert torch.equal(batch.places, places)
