"""What happens in a clip, as plain numbers: camera moves, one object, the light. Drawn at random, or given."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..engine.errors import SwiftError

SPEEDS = ("slow", "steady", "fast")
SHAPES = ("ball", "box", "blob")
# What a move travels in a clip of 33 frames, for the bounds of slow | steady | fast. Pans: parts of the picture's
# width or height; zoom: ln of the factor; roll: radians; tilt: change of depth over one picture height.
TRAVEL = {
    "pan": (0.05, 0.11, 0.21, 0.36),
    "zoom": (0.08, 0.18, 0.34, 0.55),
    "roll": (0.03, 0.08, 0.17, 0.32),
    "tilt": (0.08, 0.15, 0.26, 0.40),
}
DIRECTIONS = {
    "pan x": ("pan left", "pan right"),
    "pan y": ("pan up", "pan down"),
    "zoom": ("zoom in", "zoom out"),
    "roll": ("roll left", "roll right"),
    "tilt x": ("tilt left", "tilt right"),
    "tilt y": ("tilt back", "tilt forward"),
}
KINDS = tuple(kind for pair in DIRECTIONS.values() for kind in pair)
LIGHTS = ("warmer", "cooler", "brighter", "dimmer", "passes left", "passes right")
REFERENCE_FRAMES = 33


class ClipError(SwiftError):
    """A clip that cannot be made as asked."""


@dataclass(frozen=True)
class Move:
    """One camera move. `kind` names what the camera does: "pan left" makes the picture's content go right."""

    kind: str
    travel: float  # over 33 frames, in the units of TRAVEL, positive
    speed: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ClipError(f"camera move: got {self.kind!r}, want one of {', '.join(KINDS)}; pick one")
        if self.speed not in SPEEDS:
            raise ClipError(f"speed: got {self.speed!r}, want one of {', '.join(SPEEDS)}; pick one")


@dataclass(frozen=True)
class Sprite:
    """An object in front. Lengths are picture heights, the origin is the picture's centre, y points down."""

    shape: str
    radius: float
    start: tuple[float, float]
    travel: tuple[float, float]  # over 33 frames, linear part
    gravity: float  # added to y: gravity * time squared, time in units of 33 frames
    spin: float  # radians over 33 frames


@dataclass(frozen=True)
class Light:
    """How the light changes; `amount` is the relative change at the end of 33 frames, or of a passing light's peak."""

    kind: str
    amount: float


@dataclass(frozen=True)
class Motion:
    """All that moves in a clip. Everything at frame 0 is the unchanged scene."""

    moves: tuple[Move, ...] = ()
    ease: float = 0.0  # 0 constant speed .. 1 starts and ends at rest
    shake: float = 0.0  # amplitude in picture heights
    sprite: Sprite | None = None
    light: Light | None = None


@dataclass(frozen=True)
class MotionOdds:
    """How often what happens in a clip drawn at random."""

    moves: tuple[float, ...] = (0.08, 0.52, 0.30, 0.10)  # no move, one, two, three at once
    axes: tuple[float, ...] = (0.28, 0.20, 0.28, 0.10, 0.07, 0.07)  # in the order of DIRECTIONS
    ease: float = 0.4
    shake: float = 0.12
    sprite: float = 0.35
    light: float = 0.2


class Draws:
    """Random choices built on uniform draws of PCG64 alone, whose stream is the same for every numpy."""

    def __init__(self, *seed: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number from [low, high)."""
        return low + (high - low) * float(self._generator.random())

    def grid(self, *shape: int) -> np.ndarray:
        """Numbers from [0, 1), float32 of that shape."""
        return self._generator.random(shape).astype(np.float32)

    def chance(self, probability: float) -> bool:
        """True this often."""
        return self.uniform() < probability

    def below(self, count: int) -> int:
        """A whole number from 0 to count - 1."""
        return min(int(self.uniform() * count), count - 1)

    def weighted(self, weights: Sequence[float]) -> int:
        """The index of one of the weights, which need not add up to one."""
        target, total = self.uniform() * sum(weights), 0.0
        for index, weight in enumerate(weights):
            total += weight
            if target < total:
                return index
        return len(weights) - 1


def make_move(kind: str, speed: str = "steady", part: float = 0.5) -> Move:
    """A move of that kind and speed; `part` in [0, 1] says where within the speed's range of travel."""
    bounds, level = TRAVEL[kind.split(maxsplit=1)[0]], SPEEDS.index(speed)
    return Move(kind, bounds[level] + part * (bounds[level + 1] - bounds[level]), speed)


def draw_motion(draws: Draws, odds: MotionOdds, aspect: float) -> Motion:
    """A random motion for pictures `aspect` times as wide as high."""
    moves: list[Move] = []
    axes = list(odds.axes)
    for _ in range(draws.weighted(odds.moves)):
        axis = draws.weighted(axes)
        axes[axis] = 0.0  # an axis moves one way at a time
        kind = tuple(DIRECTIONS.values())[axis][draws.below(2)]
        moves.append(make_move(kind, SPEEDS[draws.below(3)], draws.uniform()))
    return Motion(
        tuple(moves),
        ease=draws.uniform(0.3, 1.0) if draws.chance(odds.ease) else 0.0,
        shake=draws.uniform(0.003, 0.008) if draws.chance(odds.shake) else 0.0,
        sprite=_draw_sprite(draws, aspect) if draws.chance(odds.sprite) else None,
        light=_draw_light(draws) if draws.chance(odds.light) else None,
    )


def _draw_sprite(draws: Draws, aspect: float) -> Sprite:
    """An object that is in the picture at frame 0, so that what it looks like is known from there."""
    shape = SHAPES[draws.below(3)]
    radius = draws.uniform(0.09, 0.19)
    way = draws.weighted((0.35, 0.35, 0.15, 0.15))  # right, left, down, up
    far = draws.uniform(0.35, 0.95)
    if way < 2:
        sign = 1 if way == 0 else -1
        # It starts in the half it leaves, and goes over to the other.
        start = (-sign * draws.uniform(0.1, aspect / 2 - radius), draws.uniform(-0.3, 0.3))
        gravity = draws.uniform(0.3, 0.7) if draws.chance(0.3) else 0.0
        # Thrown: up first, so that after the clip's time it is about as high as at the start.
        travel = (sign * far * aspect / 1.6, -gravity * draws.uniform(0.7, 1.1) if gravity else 0.0)
    else:
        sign = 1 if way == 2 else -1
        start = (draws.uniform(-0.4, 0.4) * aspect, -sign * draws.uniform(0.1, 0.4))
        # What goes down at a constant speed sinks; what falls gets faster.
        gravity = far if sign == 1 and draws.chance(0.5) else 0.0
        travel = (0.0, 0.0 if gravity else sign * far * 0.8)
    spin = 0.0
    if draws.chance(0.5):
        spin = travel[0] / radius * 0.5 if shape == "ball" else draws.uniform(-1.5, 1.5)
    return Sprite(shape, radius, start, travel, gravity, spin)


def _draw_light(draws: Draws) -> Light:
    kind = LIGHTS[draws.below(len(LIGHTS))]
    low, high = {"brighter": (0.2, 0.5), "dimmer": (0.25, 0.5)}.get(kind, (0.12, 0.3))
    return Light(kind, draws.uniform(low, high) * (2 if kind.startswith("passes") else 1))
