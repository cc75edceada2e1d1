"""Attention that is shown where in the first frame to look: places, targets, and what a training makes of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from stage_clips import stage1_task, stage2_task, stage_one, stage_parts

from swifti2v.training.clips import ClipConfig, make_clip
from swifti2v.training.flow import LatentBatch
from swifti2v.training.log import TrainingError
from swifti2v.training.matching import (
    MatchConfig,
    corners,
    cross_entropy,
    seen_in_first,
    stage_places,
    token_places,
)
from swifti2v.training.motion import Motion, make_move
from swifti2v.training.stage1 import Stage1Task
from swifti2v.training.stage2 import Stage2Task

CLIP = ClipConfig(128, 96, 9, 4, procedural=0, colour_jitter=0, mirror=0)


def photo() -> np.ndarray:
    y, x = np.mgrid[:300, :400] / 40
    waves = [np.sin(x * a + y * b) for a, b in ((1, 0.3), (0.4, 1.1), (0.8, -0.9))]
    return (np.stack(waves, -1) * 100 + 128).astype(np.uint8)


def test_corners_surround_a_place():
    places = torch.tensor([[1.25, 0.5], [0.0, 0.0], [3.0, 2.0], [2.0, 1.9]])
    indices, weights = corners(places, 3, 4)
    x, y = indices % 4, indices // 4
    torch.testing.assert_close((weights * x).sum(-1), places[:, 0])
    torch.testing.assert_close((weights * y).sum(-1), places[:, 1])
    torch.testing.assert_close(weights.sum(-1), torch.ones(4))
    assert indices.max() < 12


def test_places_outside_or_unknown_weigh_nothing():
    places = torch.tensor([[-0.6, 1.0], [3.6, 1.0], [1.0, 2.6], [float("nan"), 1.0], [3.4, -0.4]])
    indices, weights = corners(places, 3, 4)
    assert weights.sum(-1).tolist() == [0, 0, 0, 0, 1]
    assert (indices[-1] * weights[-1]).sum() == 3  # the nearest token, at the frame's edge
    assert 0 <= indices.min() <= indices.max() < 12
    assert corners(torch.zeros(1, 2), 1, 1)[0].tolist() == [[0, 0, 0, 0]]


def test_token_places_of_a_known_shift():
    moved = torch.zeros(1, 9, 8, 12, 2)
    moved[:, 1:5, ..., 0] = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)  # mean 2.5 pixels: 1.25 tokens
    moved[:, 5:, 0, 0] = torch.nan
    places = token_places(moved, 2, 4)
    assert places.shape == (1, 3, 4, 6, 2)
    torch.testing.assert_close(places[0, 0, 3, 5], torch.tensor([5.0, 3.0]))
    torch.testing.assert_close(places[0, 1, 3, 2], torch.tensor([3.25, 3.0]))
    assert places[0, 2, 0, 0].isnan().all()  # one pixel of four, in one frame, is unknown
    assert not places[0, 2, 0, 1].isnan().any()


@pytest.mark.parametrize("kind", ["pan left", "zoom in", "roll right"])
def test_origin_leads_back_to_the_same_content(kind):
    clip = make_clip([photo()], 3, CLIP, Motion((make_move(kind, "fast"),)))
    low = clip.low.permute(0, 3, 1, 2).float()
    height, width = low.shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack((x, y), -1) + torch.from_numpy(clip.origin[-1])
    grid = (place + 0.5) / torch.tensor([width, height]) * 2 - 1
    back = torch.nn.functional.grid_sample(low[:1], grid[None], align_corners=False)[0]
    inside = (grid.abs() < 0.9).all(-1)
    assert inside.float().mean() > 0.3
    error, still = ((other - low[-1])[:, inside].square().mean().sqrt() for other in (back, low[0]))
    assert error < 0.25 * still  # a zoom shows the same content in more pixels


def test_origin_is_unknown_where_an_object_is():
    clips_ = (make_clip([photo()], seed, CLIP) for seed in range(40))
    clip = next(clip for clip in clips_ if clip.motion.sprite)
    assert np.array_equal(np.isnan(clip.origin).any(-1), clip.covered.numpy() > 0)
    assert np.isnan(clip.origin).any()


def test_cross_entropy_is_least_where_attention_is_right():
    keys = 30 * torch.eye(16).expand(2, 3, 16, 16)  # a query of one-hot i attends to key i
    targets, weights = corners(torch.tensor([[[2.0, 1.0], [0.0, 3.0]]] * 2), 4, 4)
    right = keys[:, :, [6, 12]]
    wrong = keys[:, :, [7, 12]]
    assert cross_entropy(right, keys, targets, weights) < 1e-6
    assert cross_entropy(wrong, keys, targets, weights) > 50
    halves = corners(torch.tensor([[[2.5, 1.0]]] * 2), 4, 4)
    both = cross_entropy(keys[:, :, [6]] + keys[:, :, [7]], keys, *halves)
    torch.testing.assert_close(both, torch.tensor(2.0).log(), atol=1e-4, rtol=0)
    unknown = corners(torch.full((2, 2, 2), torch.nan), 4, 4)
    assert cross_entropy(right, keys, *unknown) == 0


def test_rounding_to_bf16_stays_out_of_the_cross_entropy():
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 6, 64).bfloat16() * 3 for _ in range(2))
    found = corners(torch.rand(1, 6, 2), 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        under = cross_entropy(q, k, *found)
    assert torch.equal(under, cross_entropy(q.float(), k.float(), *found))


def test_what_an_object_hides_in_the_first_frame_is_not_looked_for():
    places = token_places(torch.zeros(1, 5, 4, 8, 2), 2, 4)  # [1, 2, 2, 4, 2]
    places[0, 0, 0, 1] = torch.nan
    asked = torch.tensor([[[0.5, 0.0], [0.0, 0.0], [2.0, 0.0], [1.0, 0.9], [1.0, 1.0]]])
    targets, weights = corners(asked, 2, 4)
    assert seen_in_first(places, targets, weights).tolist() == [[False, True, True, False, True]]


def test_places_of_both_stages(tiny, make_modules):
    """A crop of a clip that moves by known pixels; a token of Stage I is four times one of Stage II."""
    modules = make_modules(tiny)
    origin = torch.full((1, 9, 16, 32, 2), 2.0)
    one = stage_places(origin, torch.zeros(1, 3, 9, 16, 32), modules["vae1"])
    two = stage_places(origin, torch.zeros(1, 3, 9, 64, 128), modules["vae2"])
    assert one is not None
    assert two is not None
    sides = [2 * stage.vae.spatial // factor for stage, factor in ((tiny.stage1, 1), (tiny.stage2, 4))]
    assert [tuple(places.shape[2:4]) for places in (one, two)] == [(16 // side, 32 // side) for side in sides]
    assert [float(places[0, 1, 0, 0, 0]) for places in (one, two)] == [2 / side for side in sides]


def test_the_origin_of_a_crop_is_that_of_the_whole():
    whole = make_clip([photo()], 5, CLIP)
    crop = make_clip([photo()], 5, CLIP, crop=(32, 16, 64, 48))
    assert np.array_equal(whole.origin[:, 4:16, 8:24], crop.origin, equal_nan=True)


@pytest.mark.parametrize("wrong", [{"layers": (0, 2)}, {"layers": ()}, {"heads": 0}, {"heads": 3}])
def test_layers_and_heads_that_are_not_there_are_refused(tasks, wrong):
    with pytest.raises(TrainingError, match="want some of layers 0 to 1 and 1 to 2 heads"):
        tasks(replace(TAUGHT, **wrong))


TAUGHT = MatchConfig(0.1, layers=(0, 1), heads=1, queries=40)


@pytest.fixture
def tasks(tiny, make_modules):
    """Both tasks by configuration, on clips that stand still as far as they know."""

    def make(matching: MatchConfig, known: bool = True, **config) -> tuple[Stage1Task, Stage2Task]:
        parts = stage_parts(tiny, make_modules(tiny))
        both = stage1_task(stage_one(parts), matching=matching), stage2_task(parts, matching=matching, **config)
        for task in both:
            batch = task.batch
            task.batch = lambda step, seed, batch=batch: placed(batch(step, seed)) if known else batch(step, seed)
        return both

    return make


def placed(batch: LatentBatch) -> LatentBatch:
    """The batch with each token in its own place."""
    count, _, blocks, height, width = batch.latents.shape
    return replace(batch, places=token_places(torch.zeros(count, 1 + 4 * (blocks - 1), height, width, 2), 2, 4))


@pytest.mark.parametrize("stage", [0, 1])
def test_taught_heads_learn_where_to_look(tasks, stage):
    task = tasks(TAUGHT)[stage]
    optimizer = torch.optim.Adam([p for m in task.modules.values() for p in m.parameters() if p.requires_grad], 1e-2)
    seen = []
    for step in range(30):
        loss, parts = task.loss(step % 3, step)
        assert loss.item() == pytest.approx(float(parts["velocity"] + 0.1 * parts["matching"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(parts["matching"]))
    assert np.mean(seen[-5:]) < 0.8 * np.mean(seen[:5])


def test_own_context_is_not_what_is_taught(tasks):
    """Its calls come first and have no gradient; what is kept is of the call that is trained."""
    task = tasks(TAUGHT, own_context=1.0, noisy=(2,), neighbours=(1,))[1]
    add, kept = task.watch.add, []

    def record(*arguments):
        kept.append([q.requires_grad and k.requires_grad for q, k in task.watch.seen.values()])
        return add(*arguments)

    task.watch.add = record
    segments = [task.loss(0, seed)[1]["segment"] for seed in range(6)]
    assert any(segments)
    assert kept == [[True, True]] * 6


@pytest.mark.parametrize("stage", [0, 1])
def test_watching_changes_no_velocity(tasks, stage):
    loss, parts = tasks(MatchConfig())[stage].loss(0, 1)
    assert "matching" not in parts
    _, taught = tasks(TAUGHT)[stage].loss(0, 1)
    assert taught["velocity"] == loss


def test_only_the_blocks_that_ask_are_taught(tasks):
    task = tasks(TAUGHT)[1]
    q = torch.randn(1, 2, 12, 4, requires_grad=True)
    task.watch.seen.update({layer: (q, torch.randn(1, 2, 12, 4)) for layer in TAUGHT.layers})
    places = token_places(torch.zeros(1, 9, 4, 4, 2), 2, 4)  # three blocks of four tokens
    loss, _ = task.watch.add(torch.zeros(()), places, [2], torch.Generator().manual_seed(0))
    loss.backward()
    assert q.grad is not None
    moved = q.grad.abs().sum((0, 3)) > 0
    assert moved.tolist() == [[False] * 8 + [True] * 4, [False] * 12]  # one head


def test_clips_of_unknown_motion_are_refused(tasks):
    for task in tasks(TAUGHT, known=False):
        with pytest.raises(TrainingError, match="set its weight to 0"):
            task.loss(0, 1)
