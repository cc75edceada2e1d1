"""The camera as one homography a frame, and the flow field that follows from it.

Screen coordinates: (u, v) in picture heights from the centre, u to the right, v down. `camera_path` maps the screen
of each frame to the plane of the scene, where frame 0's screen is the plane itself.
Axes: T frames, H rows, W columns.
"""

import math

import numpy as np

from .motion import REFERENCE_FRAMES, Draws, Motion, Move


def clip_time(frames: int, ease: float) -> np.ndarray:
    """How far the moves have come at each frame, float64 [T]; 1 is the travel of 33 frames, and of any longer clip.

    With ease e the speed is that of (1 - e) * s + e * smoothstep(s), which covers the same way in the same time. At one
    speed, long clips would run off every picture, into the dark, and tilt until the plane is seen from its edge.
    """
    if frames == 1:
        return np.zeros(1)
    s = np.arange(frames) / (frames - 1)
    eased = (1 - ease) * s + ease * s * s * (3 - 2 * s)
    return eased * min(1.0, (frames - 1) / (REFERENCE_FRAMES - 1))


def camera_path(motion: Motion, frames: int, aspect: float, draws: Draws) -> np.ndarray:
    """Homographies screen -> plane, float64 [T, 3, 3]; the first is the identity. `draws` only shapes the shake."""
    time = clip_time(frames, motion.ease)
    pan_x, pan_y, zoom, roll, tilt_x, tilt_y = (_travel(motion, *pair, time) for pair in _AXES)
    shake_x, shake_y = _shake(frames, motion.shake, draws), _shake(frames, motion.shake, draws)
    path = np.empty((frames, 3, 3))
    for t in range(frames):
        # The window on the plane: pan moves it, zoom in shrinks it, roll right turns it clockwise.
        size, cos, sin = math.exp(-zoom[t]), math.cos(roll[t]), math.sin(roll[t])
        window = np.array(
            [
                [size * cos, -size * sin, pan_x[t] * aspect + shake_x[t]],
                [size * sin, size * cos, pan_y[t] + shake_y[t]],
                [0, 0, 1],
            ]
        )
        # The side that tilts away shows more of the plane: its divisor is below one.
        lean = np.array([[1, 0, 0], [0, 1, 0], [tilt_x[t], tilt_y[t], 1]])
        path[t] = window @ lean
    return path


_AXES = (
    ("pan right", "pan left"),
    ("pan down", "pan up"),
    ("zoom in", "zoom out"),
    ("roll right", "roll left"),
    ("tilt left", "tilt right"),  # divisor 1 + tilt * u: positive takes the left side away
    ("tilt back", "tilt forward"),  # likewise, positive takes the top away
)


def _travel(motion: Motion, plus: str, minus: str, time: np.ndarray) -> np.ndarray:
    def amount(move: Move) -> float:
        return move.travel * ((move.kind == plus) - (move.kind == minus))

    return sum(amount(move) for move in motion.moves) * time


def _shake(frames: int, amplitude: float, draws: Draws) -> np.ndarray:
    """Three slow sines, zero at frame 0, float64 [T]."""
    t = np.arange(frames)
    total = np.zeros(frames)
    for typical in (17.0, 9.0, 5.5):
        phase, period = draws.uniform(0, 2 * math.pi), typical * draws.uniform(0.8, 1.25)
        total += period / 17 * (np.sin(2 * math.pi * t / period + phase) - math.sin(phase))
    return amplitude * total


def project(matrix: np.ndarray, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points through homographies [..., 3, 3]; `u` and `v` broadcast against the leading axes."""
    m = matrix
    w = m[..., 2, 0] * u + m[..., 2, 1] * v + m[..., 2, 2]
    x = (m[..., 0, 0] * u + m[..., 0, 1] * v + m[..., 0, 2]) / w
    y = (m[..., 1, 0] * u + m[..., 1, 1] * v + m[..., 1, 2]) / w
    return x, y


def screen_grid(width: int, height: int, unit: float, left: float = 0, top: float = 0, whole: tuple[int, int] = (0, 0)):
    """Screen coordinates of pixel centres, (u [1, W], v [H, 1]), of a crop at (left, top) out of a `whole` picture.

    `unit` is the height of the whole picture in these pixels; without `whole` the crop is the picture.
    """
    full_width, full_height = whole if whole[0] else (width, height)
    u = (np.arange(width) + 0.5 + left - full_width / 2) / unit  # [W]
    v = (np.arange(height) + 0.5 + top - full_height / 2) / unit  # [H]
    return u[None, :], v[:, None]  # -> [1, W], [H, 1]


def corner_extent(path: np.ndarray, aspect: float) -> tuple[float, float, float, float]:
    """What the screens of all frames cover of the plane: (left, top, right, bottom)."""
    u = np.array([-0.5, 0.5, 0.5, -0.5]) * aspect
    v = np.array([-0.5, -0.5, 0.5, 0.5])
    x, y = project(path[:, None], u[None], v[None])  # [T, 4]
    return float(x.min()), float(y.min()), float(x.max()), float(y.max())


def widest_step(path: np.ndarray, aspect: float) -> float:
    """The most that the plane moves per step on the screen, in any direction, over all frames: 1 is frame 0's."""
    u = np.array([-0.5, 0, 0.5])[None, :] * aspect
    v = np.array([-0.5, 0, 0.5])[:, None]
    step = 1e-3
    stack = path[:, None, None]
    x, y = project(stack, u, v)  # [T, 3, 3]
    steps = [
        np.hypot(*(a - b for a, b in zip(project(stack, u + du, v + dv), (x, y), strict=True)))
        for du, dv in ((step, 0), (0, step), (step / 2**0.5, step / 2**0.5), (step / 2**0.5, -step / 2**0.5))
    ]
    return float(np.max(steps)) / step


def camera_flow(path: np.ndarray, u: np.ndarray, v: np.ndarray, pixels: float) -> np.ndarray:
    """Where the camera carries each pixel by the next frame: float32 [T-1, H, W, 2], (x, y) in pixels.

    frame[t](p) shows what frame[t + 1](p + flow[t](p)) shows. `pixels` is the picture's height in those pixels.
    """
    forward = np.linalg.inv(path[1:]) @ path[:-1]  # [T-1, 3, 3], screen of t -> screen of t + 1
    return _carried(forward, u, v, pixels)


def camera_origin(path: np.ndarray, u: np.ndarray, v: np.ndarray, pixels: float) -> np.ndarray:
    """How far off in frame 0 each pixel's content was: float32 [T, H, W, 2], as `camera_flow`.

    frame[t](p) shows what frame[0](p + origin[t](p)) shows, where that is within the picture.
    """
    back = np.linalg.inv(path[:1]) @ path  # [T, 3, 3], screen of t -> screen of 0
    return _carried(back, u, v, pixels)


def _carried(matrices: np.ndarray, u: np.ndarray, v: np.ndarray, pixels: float) -> np.ndarray:
    """How far homographies [n, 3, 3] carry points of the screen: float32 [n, H, W, 2], (x, y) in pixels."""
    x, y = project(matrices[:, None, None], u, v)  # [n, H, W]
    return (np.stack([x - u, y - v], -1) * pixels).astype(np.float32)
