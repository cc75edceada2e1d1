"""What is measured on a clip: each function gives the sums of one clip, from which a statistic of many is pooled.

Frames are uint8 [T, H, W, 3]. Frame 0 is the input image, so all comparisons are over frames 1 to T-1. Clips are
walked frame by frame, as a float copy of a whole one is large.
"""

import itertools

import numpy as np

from ..engine.profile import Profile
from ..engine.segments import plan_segments
from .library import library

STILL = 1e-3  # levels: where nothing moves, nothing jumps
LUMA = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)  # BT.709


def luma(frame: np.ndarray) -> np.ndarray:
    """The brightness of pixels [..., 3], float32 in 0 to 255."""
    return frame.astype(np.float32) @ LUMA


def squared_error(frames: np.ndarray, truth: np.ndarray) -> tuple[float, int]:
    """Sum of squared differences in levels over frames 1 to T-1 and all channels, and how many values that are."""
    total = sum(_squares(a, b) for a, b in zip(frames[1:], truth[1:], strict=True))
    return total, truth[1:].size


def frame_error(frame: np.ndarray, truth: np.ndarray) -> tuple[float, int]:
    """As `squared_error`, of one frame [H, W, 3]."""
    return _squares(frame, truth), truth.size


def psnr(error: np.ndarray | float, count: np.ndarray | float) -> float:
    """Peak signal-to-noise ratio in dB of pooled squared error: 10 log10(255^2 / (sum of errors / sum of counts))."""
    return float(10 * np.log10(255.0**2 * np.sum(count) / np.sum(error)))


def gradient_energy(frames: np.ndarray) -> float:
    """Sharpness: mean over frames 1 to T-1 of the squared forward differences of luma along x, plus along y."""
    energies = []
    for frame in frames[1:]:
        y = luma(frame)
        energies.append(np.square(np.diff(y, axis=1)).mean() + np.square(np.diff(y, axis=0)).mean())
    return float(np.mean(energies))


def second_difference(frames: np.ndarray) -> float:
    """Flicker: mean |f[t-1] - 2 f[t] + f[t+1]| in levels, t from 2 to T-2, so that only made frames count."""
    made = frames[1:]
    values = [
        np.abs(a.astype(np.int16) - 2 * b.astype(np.int16) + c.astype(np.int16)).mean()
        for a, b, c in zip(made, made[1:], made[2:], strict=False)
    ]
    return float(np.mean(values))


def ssim(frames: np.ndarray, truth: np.ndarray, every: int) -> float:
    """Structural similarity of luma (Gaussian window, sigma 1.5), mean over frames every, 2*every, ..."""
    similarity = library("skimage.metrics").structural_similarity
    options = {"data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    values = [similarity(luma(frames[t]), luma(truth[t]), **options) for t in range(every, len(truth), every)]
    return float(np.mean(values))


def steps(frames: np.ndarray) -> np.ndarray:
    """D(t) = mean |f[t+1] - f[t]| in levels, float64 [T-1]."""
    return np.array([np.abs(a.astype(np.int16) - b.astype(np.int16)).mean() for a, b in itertools.pairwise(frames)])


def boundaries(profile: Profile) -> tuple[list[int], list[int]]:
    """The steps t at which one latent block ends and the next begins: (between segments, within a segment).

    Block b >= 1 is frames 4b-3 to 4b, so the step is t = 4b. The step from the image to block 1 is in neither.
    """
    ends = {segment.noisy[-1] for segment in plan_segments(profile.blocks, profile.noisy, profile.neighbours)}
    between = [b * profile.block_frames for b in range(1, profile.blocks - 1) if b in ends]
    within = [b * profile.block_frames for b in range(1, profile.blocks - 1) if b not in ends]
    return between, within


def jumps(frames: np.ndarray) -> np.ndarray:
    """J(t) = D(t) of the luma over the mean of D(t-1) and D(t+1), float64 [T-1]; NaN at both ends, 1 is none.

    So a fast clip counts no more than a slow one.
    """
    d = np.array([np.abs(luma(a) - luma(b)).mean(dtype=np.float64) for a, b in itertools.pairwise(frames)])
    found = np.full(len(d), np.nan)
    found[1:-1] = (d[1:-1] + STILL) / ((d[:-2] + d[2:]) / 2 + STILL)
    return found


def seam_sums(frames: np.ndarray, profile: Profile) -> np.ndarray:
    """(sum of J, count) at segment boundaries and (sum of J, count) at the other block boundaries, float64 [4]."""
    j = jumps(frames)
    between, within = boundaries(profile)
    return np.array([j[between].sum(), len(between), j[within].sum(), len(within)])


def seam_ratio(sums: np.ndarray) -> float:
    """Mean J at segment boundaries over mean J at the other block boundaries, pooled over clips [n, 4]; 1 is none.

    NaN where a clip has one of the two kinds only.
    """
    between, between_count, within, within_count = sums.sum(0)
    return float(between / between_count / (within / within_count))


def block_pulse(sums: np.ndarray) -> float:
    """Mean J at all block boundaries, of `seam_sums` of clips [n, 4]; 1 is a motion that does not halt in a block."""
    between, between_count, within, within_count = sums.sum(0)
    return float((between + within) / (between_count + within_count))


def first_step(frames: np.ndarray, block_frames: int) -> np.ndarray:
    """(D of the step from the image to frame 1, mean D of the other steps of block 1), float64 [2]."""
    d = steps(frames[: block_frames + 1])
    return np.array([d[0], d[1:].mean()])


def segment_colours(frames: np.ndarray, profile: Profile) -> np.ndarray:
    """Mean colour in levels of the frames that each segment made, without the image: float64 [segments, 3]."""
    colours, step = [], profile.block_frames
    for segment in plan_segments(profile.blocks, profile.noisy, profile.neighbours):
        part = frames[(segment.noisy[0] - 1) * step + 1 : segment.noisy[-1] * step + 1]
        colours.append(part.mean((0, 1, 2), dtype=np.float64))
    return np.array(colours)


def colour_drift(colours: np.ndarray) -> float:
    """Mean over clips of |last segment - first segment|, of the channel where that is largest. colours [n, S, 3]."""
    return float(np.abs(colours[:, -1] - colours[:, 0]).mean(0).max())


def _squares(a: np.ndarray, b: np.ndarray) -> float:
    difference = a.astype(np.int32) - b.astype(np.int32)
    return float(np.square(difference).sum(dtype=np.int64))
