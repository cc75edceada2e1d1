"""Optical flow of a clip, how much moves, and which of the six basic camera moves it is.

Flow is scikit-image's iterative Lucas-Kanade, on luma at low resolution, between frames one latent block apart: large
enough for slow moves to be seen, small enough for fast ones to be found.
Axes: H rows, W columns; flow [H, W, 2] is (x, y) in pixels, from a frame to the later one.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ..engine.errors import SpecError
from ..training.motion import REFERENCE_FRAMES
from ..training.prompts import CANONICAL, canonical_motion
from .library import library
from .metrics import luma

RADIUS = 7
# A choice must show this part of the canonical move's speed; below, the clip counts as still and so as a wrong answer.
# The slowest trained pan has a third of it.
LEAST = 0.1
STILL = "still"
TRIMS = 3


def clip_flows(low: np.ndarray, step: int) -> list[np.ndarray]:
    """Flow from frame 0 to `step`, from there to 2 `step`, ... of low-resolution frames uint8 [T, h, w, 3]."""
    if len(low) <= step:
        raise SpecError(f"flow: got {len(low)} frames, want more than {step}; pass a whole clip")
    estimate = library("skimage.registration").optical_flow_ilk
    grey = [luma(low[t]) / 255 for t in range(0, len(low), step)]
    flows = []
    for a, b in pairwise(grey):
        down, right = estimate(a, b, radius=RADIUS)
        flows.append(np.stack((right, down), axis=-1))  # 2 x [H, W] -> [H, W, 2]
    return flows


def dynamic_degree(flows: Sequence[np.ndarray], step: int) -> float:
    """Mean length of the flow in low-resolution pixels a frame."""
    return float(np.mean([np.hypot(flow[..., 0], flow[..., 1]).mean() for flow in flows]) / step)


def fit_camera(flow: np.ndarray) -> np.ndarray:
    """Least-squares (tx, ty, d) of flow = (tx, ty) + d * (x, y) from the centre, float64 [3], in pixels and 1.

    Pixels that fit badly (objects, what came into view) are left out, in a few rounds.
    """
    height, width = flow.shape[:2]
    x = np.broadcast_to(np.arange(width) - (width - 1) / 2, (height, width)).ravel()
    y = np.broadcast_to((np.arange(height) - (height - 1) / 2)[:, None], (height, width)).ravel()
    u, v = flow[..., 0].ravel(), flow[..., 1].ravel()
    kept = np.ones(len(u), dtype=bool)
    fit = np.zeros(3)
    for _ in range(TRIMS):
        n = int(kept.sum())
        one, none = np.ones(n), np.zeros(n)
        rows = np.concatenate((np.stack((one, none, x[kept]), 1), np.stack((none, one, y[kept]), 1)))  # [2n, 3]
        fit = np.linalg.lstsq(rows, np.concatenate((u[kept], v[kept])), rcond=None)[0]
        residual = np.hypot(u - fit[0] - fit[2] * x, v - fit[1] - fit[2] * y)
        keep = residual <= 2 * np.median(residual[kept]) + 1e-6
        if keep.sum() < max(16, n // 4):
            break
        kept = keep
    return fit


def classify(flows: Sequence[np.ndarray], step: int) -> str:
    """The canonical prompt whose move the flows show most of, or "still".

    Translation and divergence are each measured in the speed of the canonical move. "camera pans left" makes the
    content go right.
    """
    height, width = flows[0].shape[:2]
    tx, ty, d = np.mean([fit_camera(flow) for flow in flows], axis=0) / step
    sizes = {"pan left": width, "pan right": width, "pan up": height, "pan down": height}
    seen = {"pan left": tx, "pan right": -tx, "pan up": ty, "pan down": -ty, "zoom in": d, "zoom out": -d}
    scores = {}
    for prompt, kind in CANONICAL.items():
        speed = canonical_motion(prompt).moves[0].travel / (REFERENCE_FRAMES - 1) * sizes.get(kind, 1)
        scores[prompt] = seen[kind] / speed
    best = max(scores, key=lambda prompt: scores[prompt])
    return best if scores[best] >= LEAST else STILL
