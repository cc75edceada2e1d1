"""Generated clips: the same seed is the same clip, and what is said of a clip is what its pixels do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from swifti2v.training.camera import camera_flow, camera_path, clip_time
from swifti2v.training.clips import Clip, ClipConfig, make_clip, shrink_frames
from swifti2v.training.motion import (
    KINDS,
    LIGHTS,
    SHAPES,
    SPEEDS,
    ClipError,
    Draws,
    Light,
    Motion,
    MotionOdds,
    Sprite,
    draw_motion,
    make_move,
)
from swifti2v.training.prompts import CANONICAL, STILL, canonical_motion, describe
from swifti2v.training.textures import draw_texture, octaves

SMALL = ClipConfig(width=192, height=128, frames=9, procedural=0.0, colour_jitter=0.0, mirror=0.0)
BUSY = MotionOdds(moves=(0, 0.3, 0.4, 0.3), shake=0.5, sprite=1.0, light=0.7)


def photo(seed: int = 0, width: int = 480, height: int = 320) -> np.ndarray:
    """A picture with detail of all sizes and no pattern."""
    field = octaves(Draws(seed), width, height, 4, 6, 0.8)
    return np.round(255 * field).astype(np.uint8)


def grey(frame: torch.Tensor) -> np.ndarray:
    return frame.float().mean(-1).numpy()


def shift(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """How far the content of a moved to become b, (x, y) in pixels, by phase correlation; whole pixels."""
    window = np.hanning(a.shape[0])[:, None] * np.hanning(a.shape[1])[None, :]
    spectra = [np.fft.fft2((x - x.mean()) * window) for x in (a, b)]
    cross = spectra[1] * np.conj(spectra[0])
    peak = np.fft.ifft2(cross / (np.abs(cross) + 1e-9)).real
    y, x = np.unravel_index(int(peak.argmax()), peak.shape)
    height, width = a.shape
    return float((x + width // 2) % width - width // 2), float((y + height // 2) % height - height // 2)


def psnr(a: torch.Tensor, b: torch.Tensor, where: torch.Tensor) -> float:
    return float(10 * torch.log10(255**2 / ((a - b) ** 2)[where].mean()))


def same(a: Clip, b: Clip) -> bool:
    return bool(torch.equal(a.frames, b.frames) and torch.equal(a.low, b.low) and a.prompt == b.prompt)


def test_a_seed_is_a_clip():
    photos, config = [photo(1), photo(2)], replace(SMALL, odds=BUSY, procedural=0.3, colour_jitter=0.1, mirror=0.5)
    first = [make_clip(photos, seed, config) for seed in range(4)]
    assert all(same(clip, make_clip(photos, seed, config)) for seed, clip in enumerate(first))
    assert not any(same(first[i], first[j]) for i in range(4) for j in range(i))


def test_the_number_of_threads_changes_nothing():
    photos, config = [photo(1), photo(2)], replace(SMALL, odds=BUSY, procedural=0.3, frames=3)
    one = [make_clip(photos, seed, config) for seed in range(6)]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert all(same(clip, make_clip(photos, seed, config)) for seed, clip in enumerate(one))
    finally:
        torch.set_num_threads(threads)


def test_the_shape_of_a_clip():
    clip = make_clip([photo()], 5, SMALL)
    assert (clip.frames.shape, clip.frames.dtype) == ((9, 128, 192, 3), torch.uint8)
    assert (clip.low.shape, clip.low.dtype) == ((9, 32, 48, 3), torch.uint8)
    assert clip.flow.shape == (8, 32, 48, 2)
    assert clip.covered.shape == (9, 32, 48)


def test_without_photographs_clips_are_procedural():
    clips = [make_clip([], seed, SMALL) for seed in range(6)]
    assert len({clip.frames.numpy().tobytes() for clip in clips}) == 6
    assert all(float(clip.frames.float().std()) > 5 for clip in clips)


@pytest.mark.parametrize("seed", range(8))
def test_textures_are_seeded_pictures(seed: int):
    texture = draw_texture(Draws(seed), 320, 200)
    assert (texture.shape, texture.dtype) == ((200, 320, 3), np.uint8)
    assert texture.std() > 5
    np.testing.assert_array_equal(texture, draw_texture(Draws(seed), 320, 200))


def test_a_given_motion_keeps_the_scene():
    still, moved = (
        make_clip([photo(1), photo(2)], 3, SMALL, motion) for motion in (Motion(), canonical_motion("zoom in"))
    )
    assert still.prompt in STILL
    assert bool((still.frames == still.frames[0]).all())
    assert not torch.equal(moved.frames[0], moved.frames[-1])


# What the content of the picture does, in signs of (x, y), when the camera does the named thing.
CONTENT = {"pan left": (1, 0), "pan right": (-1, 0), "pan up": (0, 1), "pan down": (0, -1)}


@pytest.mark.parametrize("kind", CONTENT)
@pytest.mark.parametrize("seed", range(2))
def test_a_pan_moves_the_picture_the_other_way(kind: str, seed: int):
    move = make_move(kind, "steady")
    clip = make_clip([photo(seed)], seed, SMALL, Motion((move,)))
    length = move.travel * (192 if CONTENT[kind][0] else 128) * 8 / 32
    want = (CONTENT[kind][0] * length, CONTENT[kind][1] * length)
    assert np.abs(np.subtract(shift(grey(clip.frames[0]), grey(clip.frames[-1])), want)).max() <= 0.6
    np.testing.assert_allclose(clip.flow.sum(0)[16, 24] * 4, want, atol=1e-3)


@pytest.mark.parametrize(("kind", "sign"), [("zoom in", 1), ("zoom out", -1)])
def test_zoom_in_enlarges(kind: str, sign: int):
    move = make_move(kind, "fast", 1.0)
    clip = make_clip([photo(1)], 1, SMALL, Motion((move,)))
    factor = float(np.exp(sign * move.travel * 8 / 32))
    first, last = (clip.frames[t].permute(2, 0, 1)[None].float() for t in (0, -1))

    def scaled(by: float) -> torch.Tensor:
        matrix = torch.tensor([[[1 / by, 0, 0], [0, 1 / by, 0]]])
        return F.grid_sample(first, F.affine_grid(matrix, [1, 3, 128, 192], align_corners=False), align_corners=False)

    inner = torch.zeros(1, 3, 128, 192, dtype=torch.bool)
    inner[..., 20:-20, 30:-30] = True
    assert psnr(scaled(factor), last, inner) > psnr(scaled(1 / factor), last, inner) + 6
    assert psnr(scaled(factor), last, inner) > psnr(scaled(1.0), last, inner) + 6


def turn(clip: Clip) -> tuple[float, float]:
    """Curl of the whole flow at the centre, and how unequal the sides are: (curl, divergence right minus left)."""
    flow = clip.flow.sum(0)
    curl = float((flow[16, 40, 1] - flow[16, 8, 1]) - (flow[28, 24, 0] - flow[4, 24, 0]))
    return curl, float((flow[28, 40, 1] - flow[4, 40, 1]) - (flow[28, 8, 1] - flow[4, 8, 1]))


def test_roll_and_tilt_go_the_way_they_say():
    clips = {kind: make_clip([photo()], 0, SMALL, Motion((make_move(kind, "fast"),))) for kind in KINDS}
    # With y down, content that turns clockwise has a positive curl; the camera turned the other way.
    assert turn(clips["roll left"])[0] > 1
    assert turn(clips["roll right"])[0] < -1
    # The side that goes away shrinks: on the left for tilt left, so that the right diverges more.
    assert turn(clips["tilt left"])[1] > 0.3
    assert turn(clips["tilt right"])[1] < -0.3
    spread = {kind: clips[kind].flow.sum(0) for kind in ("tilt back", "tilt forward")}
    wider = {kind: (f[28, 40, 0] - f[28, 8, 0]) - (f[4, 40, 0] - f[4, 8, 0]) for kind, f in spread.items()}
    assert wider["tilt back"] > 0.3
    assert wider["tilt forward"] < -0.3


@pytest.mark.parametrize("seed", range(6))
def test_the_flow_carries_one_frame_to_the_next(seed: int):
    config = replace(SMALL, width=256, height=192, odds=replace(BUSY, light=0.0))
    clip = make_clip([photo(seed), photo(seed + 1)], seed, config)
    low = clip.low.float().permute(0, 3, 1, 2)  # [T, h, w, 3] -> [T, 3, h, w]
    height, width = low.shape[2:]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    at = torch.stack((x, y), -1) + torch.from_numpy(clip.flow)  # [T-1, h, w, 2]
    grid = 2 * at / torch.tensor([width, height]) - 1
    carried = F.grid_sample(low[1:], grid, mode="bicubic", align_corners=False)
    hidden = F.max_pool2d(clip.covered[:, None], 7, 1, 3)
    clear = (hidden[1:] + hidden[:-1])[:, 0] == 0
    clear[:, :4], clear[:, -4:], clear[:, :, :4], clear[:, :, -4:] = False, False, False, False
    where = clear[:, None].expand(-1, 3, -1, -1)
    assert psnr(carried, low[:-1], where) > 30
    # and no field at all does worse
    assert psnr(low[1:], low[:-1], where) < psnr(carried, low[:-1], where) - 1


def test_flow_ends_where_the_path_ends():
    motion = Motion(
        (make_move("roll left", "fast"), make_move("zoom in"), make_move("tilt back")), ease=1.0, shake=0.005
    )
    path = camera_path(motion, 9, 1.5, Draws(0))
    np.testing.assert_allclose(path[0], np.eye(3), atol=1e-12)
    point = np.array([0.2, -0.1])
    for t in range(8):
        point = point + camera_flow(path[t : t + 2], point[None, :1], point[None, 1:], 1.0)[0, 0, 0]
    plane = path[-1] @ [*point, 1]
    np.testing.assert_allclose(plane[:2] / plane[2], [0.2, -0.1], atol=1e-6)


@pytest.mark.parametrize("factor", [2, 4])
def test_low_is_the_mean_of_the_pixels_it_covers(factor: int):
    clip = make_clip([photo(1), photo(2)], 2, replace(SMALL, odds=BUSY, low_factor=factor))
    high = clip.frames.numpy().astype(np.float64)
    means = high.reshape(9, 128 // factor, factor, 192 // factor, factor, 3).mean((2, 4))
    np.testing.assert_array_equal(clip.low.numpy(), np.floor(means + 0.5).astype(np.uint8))


def test_low_rounds_halves_up():
    frames = torch.tensor([[0, 1], [0, 1]], dtype=torch.uint8)[None, :, :, None].expand(1, 2, 2, 3)
    assert shrink_frames(frames, 2).flatten().tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", ["zoom out", "tilt back", "roll right"])
def test_detail_too_fine_turns_grey(kind: str):
    board = ((np.indices((900, 1300)).sum(0) % 2) * 255).astype(np.uint8)
    board = np.repeat(board[:, :, None], 3, 2)
    clip = make_clip([board], 0, replace(SMALL, frames=5), Motion((make_move(kind, "fast"),)))
    assert float(clip.frames.float().std()) < 3
    assert abs(float(clip.frames.float().mean()) - 127.5) < 3


def test_noise_too_fine_is_averaged():
    noise = np.repeat((Draws(0).grid(900, 1300, 1) * 255).astype(np.uint8), 3, 2)
    clip = make_clip([noise], 0, replace(SMALL, frames=5), Motion((make_move("pan left", "fast"),)))
    # A pixel covers over 4 x 4 values here: their mean deviates by less than a quarter of one value's.
    assert float(clip.frames.float().std()) < 255 / 12**0.5 / 4
    still = make_clip([noise], 0, replace(SMALL, frames=5), Motion())
    assert float(still.frames.float().std()) < 255 / 12**0.5 / 4


def test_detail_that_fits_stays():
    stripes = np.repeat(np.repeat(((np.arange(480) // 8 % 2) * 255).astype(np.uint8)[None, :, None], 320, 0), 3, 2)
    clip = make_clip([stripes], 0, SMALL, Motion())
    assert float(clip.frames.float().std()) > 100


@pytest.mark.parametrize("seed", range(4))
def test_a_crop_has_the_pixels_of_the_whole(seed: int):
    photos, config = [photo(1), photo(2)], replace(SMALL, odds=BUSY, frames=5)
    whole = make_clip(photos, seed, config)
    x, y, width, height = crop = ((0, 0, 64, 64), (40, 20, 96, 80), (128, 64, 64, 64), (4, 8, 4, 4))[seed]
    part = make_clip(photos, seed, config, crop=crop)
    box = (slice(None), slice(y, y + height), slice(x, x + width))
    low = (slice(None), slice(y // 4, (y + height) // 4), slice(x // 4, (x + width) // 4))
    assert int((part.frames.int() - whole.frames[box].int()).abs().max()) <= 1
    assert int((part.low.int() - whole.low[low].int()).abs().max()) <= 1
    np.testing.assert_allclose(part.flow, whole.flow[low], atol=1e-5)
    torch.testing.assert_close(part.covered, whole.covered[low], atol=1e-4, rtol=0)
    assert part.prompt == whole.prompt


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("travel", [(0.8, 0.0), (-0.8, 0.0), (0.0, 0.6)])
def test_an_object_goes_where_it_is_sent(shape: str, travel: tuple[float, float]):
    sprite = Sprite(shape, 0.15, (-travel[0] / 2, -travel[1] / 2), travel, 0.0, 0.5)
    clip = make_clip([photo(1), photo(2)], 0, replace(SMALL, frames=33), Motion(sprite=sprite))
    y, x = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(48) + 0.5, indexing="ij")
    total = clip.covered.sum((1, 2))
    centre = torch.stack(((clip.covered * x).sum((1, 2)) / total, (clip.covered * y).sum((1, 2)) / total), -1)
    assert float((centre[-1] - centre[0] - torch.tensor(travel) * 32).abs().max()) < 0.8
    assert float(clip.covered.max()) > 0.99
    area = {"ball": np.pi, "box": 4 * 0.95 * 0.75 - (4 - np.pi) * 0.25**2, "blob": np.pi}[shape] * (0.15 * 32) ** 2
    assert float(total[16]) == pytest.approx(area, rel=0.02 if shape != "blob" else 0.05)
    # Where it hides nothing, in no frame, the still scene is seen.
    never = (clip.covered.amax(0) == 0)[None, :, :, None].expand_as(clip.low)
    assert bool((clip.low == clip.low[0])[never].all())
    assert not bool((clip.low == clip.low[0]).all())


def test_gravity_bends_the_way():
    sprite = Sprite("ball", 0.1, (-0.4, 0.0), (0.8, -0.5), 0.5, 0.0)
    clip = make_clip([photo(1), photo(2)], 0, replace(SMALL, frames=33), Motion(sprite=sprite))
    rows = (clip.covered.sum(2) * torch.arange(32)).sum(1) / clip.covered.sum((1, 2))
    assert float(rows[16]) < float(rows[0]) - 2
    assert abs(float(rows[32] - rows[0])) < 0.5


def colour_change(kind: str) -> np.ndarray:
    clip = make_clip([photo() // 2], 0, replace(SMALL, frames=33), Motion(light=Light(kind, 0.3)))
    return clip.frames.float().mean((1, 2)).numpy() @ np.eye(3)  # [T, 3]


@pytest.mark.parametrize("kind", LIGHTS[:4])
def test_light_changes_as_it_says(kind: str):
    means = colour_change(kind)
    red, green, blue = means[-1] / means[0]
    want = {
        "warmer": red > 1.2 and blue < 1,
        "cooler": blue > 1.2 and red < 1,
        "brighter": min(red, green, blue) > 1.2,
        "dimmer": max(red, green, blue) < 0.8,
    }
    assert want[kind]


@pytest.mark.parametrize(("kind", "sign"), [("passes right", 1), ("passes left", -1)])
def test_a_passing_light_passes(kind: str, sign: int):
    clip = make_clip(
        [np.full((320, 480, 3), 100, np.uint8)], 0, replace(SMALL, frames=33), Motion(light=Light(kind, 0.4))
    )
    brightest = clip.low.float().mean((1, 3)).argmax(1)  # [T, h, w, 3] -> [T], the column
    assert sign * int(brightest[-1] - brightest[0]) > 40


def test_ease_covers_the_same_way():
    plain, eased = clip_time(33, 0.0), clip_time(33, 1.0)
    assert plain[-1] == pytest.approx(1) == eased[-1]
    assert eased[1] < plain[1] / 4
    assert clip_time(17, 0.0)[-1] == pytest.approx(0.5)
    assert clip_time(81, 0.0)[-1] == clip_time(241, 1.0)[-1] == 1, "a long clip goes no farther"
    assert clip_time(1, 0.5).tolist() == [0]


WORDS = {"left", "right", "up", "down", "in", "out", "back", "forward"}


@pytest.mark.parametrize("seed", range(150))
def test_words_say_what_happens(seed: int):
    draws = Draws(seed)
    motion = draw_motion(draws, MotionOdds(sprite=0.4, light=0.4, shake=0.3), 1.6)
    prompt = describe(motion, draws)
    parts = prompt.split(", ")
    assert len(parts) == max(1, len(motion.moves)) + sum(map(bool, (motion.shake, motion.sprite, motion.light)))
    if not motion.moves:
        assert parts[0] in STILL
    for move, part in zip(motion.moves, parts, strict=False):
        kind, direction = move.kind.split()
        assert kind in part or (kind == "pan" and "the view moves" in part)
        assert set(part.split()) & WORDS == {direction}
        assert ("slow" in part, "fast" in part) == (move.speed == "slow", move.speed == "fast")
    if motion.sprite:
        words = parts[max(1, len(motion.moves)) + bool(motion.shake)].split()
        assert motion.sprite.shape in words
        x, y = motion.sprite.travel
        assert set(words) & {"left", "right"} == ({"right"} if x > 0 else {"left"} if x < 0 else set())
        if not x:
            assert ({"rises", "up"} & set(words) != set()) == (y < 0)


def test_speeds_are_apart():
    for kind in KINDS:
        ends = [(make_move(kind, speed, 0).travel, make_move(kind, speed, 1).travel) for speed in SPEEDS]
        assert ends[0][0] < ends[0][1] <= ends[1][0] < ends[1][1] <= ends[2][0] < ends[2][1]


def test_canonical_prompts_are_among_the_trained_words():
    assert len(CANONICAL) == 6
    for prompt, kind in CANONICAL.items():
        motion = canonical_motion(prompt)
        assert [move.kind for move in motion.moves] == [kind]
        assert prompt in {describe(motion, Draws(seed)) for seed in range(60)}
    with pytest.raises(ClipError, match=r"canonical prompt: got 'dance', want one of .*; "):
        canonical_motion("dance")


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ClipError, match=r"clip size: got 190x128, .*; "):
        replace(SMALL, width=190)
    with pytest.raises(ClipError, match=r"crop: got \(2, 0, 64, 64\), want multiples of 4 within 192x128; "):
        make_clip([], 0, SMALL, crop=(2, 0, 64, 64))
    with pytest.raises(ClipError, match=r"crop: got "):
        make_clip([], 0, SMALL, crop=(160, 0, 64, 64))
    with pytest.raises(ClipError, match=r"clip seed: got -1, "):
        make_clip([], -1, SMALL)
    with pytest.raises(ClipError, match=r"photo 0: got float64 "):
        make_clip([np.zeros((400, 400, 3))], 0, SMALL)
    with pytest.raises(ClipError, match=r"camera move: got 'fly', "):
        replace(make_move("pan left"), kind="fly")
    with pytest.raises(ClipError, match=r"speed: got 'quick', "):
        replace(make_move("pan left"), speed="quick")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("seed", range(4))
def test_a_gpu_draws_the_same_clip(seed: int):
    photos, config = [photo(1), photo(2)], replace(SMALL, odds=BUSY)
    cpu, gpu = (make_clip(photos, seed, config, device=device) for device in ("cpu", "cuda"))
    difference = (gpu.frames.cpu().int() - cpu.frames.int()).abs()
    assert int(difference.max()) <= 2
    assert float((difference > 0).float().mean()) < 0.02
