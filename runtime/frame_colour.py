"""Colour spaces of float frames: the models make display-referred sRGB; files may ask for linear light.

Sources: IEC 61966-2-1 (the sRGB curve), ITU-R BT.709 and ACES TB-2014-004 (primaries), Lindbloom (Bradford).
"""

from dataclasses import dataclass

import numpy as np

# CIE xy of red, green, blue and white: the order of OpenEXR's attribute `chromaticities`.
REC709 = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, 0.3127, 0.3290)
AP1 = (0.713, 0.293, 0.165, 0.830, 0.128, 0.044, 0.32168, 0.33767)

BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])  # XYZ to cones


@dataclass(frozen=True)
class Colour:
    """A colour space that files can be in. `interop` is its name in OpenEXR's `colorInteropID`."""

    name: str
    interop: str
    primaries: tuple[float, ...]
    linear: bool


SRGB = Colour("srgb", "srgb_rec709_display", REC709, linear=False)
COLOURS = {
    colour.name: colour
    for colour in (
        SRGB,
        Colour("lin_rec709", "lin_rec709_scene", REC709, linear=True),
        Colour("acescg", "lin_ap1_scene", AP1, linear=True),
    )
}


def from_srgb(frames: np.ndarray, colour: Colour) -> np.ndarray:
    """float32 [..., 3] in the colour space, of sRGB in [0, 1]. Black stays 0 and white 1 in each."""
    if colour.linear:
        frames = srgb_to_linear(frames)
    if colour.primaries != REC709:
        frames = frames @ rgb_matrix(REC709, colour.primaries).T.astype(np.float32)  # [..., 3] @ [3, 3]
    return frames


def srgb_to_linear(values: np.ndarray) -> np.ndarray:
    """Linear light of float values by the sRGB curve, in the same type."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4).astype(values.dtype)


def rgb_matrix(source: tuple[float, ...], target: tuple[float, ...]) -> np.ndarray:
    """fp64 [3, 3] that takes linear RGB columns from one set of primaries to another, adapting white by Bradford."""
    cones = BRADFORD @ _white(source), BRADFORD @ _white(target)
    adapt = np.linalg.inv(BRADFORD) @ np.diag(cones[1] / cones[0]) @ BRADFORD
    return np.linalg.inv(_to_xyz(target)) @ adapt @ _to_xyz(source)


def _white(primaries: tuple[float, ...]) -> np.ndarray:
    x, y = primaries[6:]
    return np.array([x / y, 1.0, (1 - x - y) / y])


def _to_xyz(primaries: tuple[float, ...]) -> np.ndarray:
    """[3, 3]: linear RGB to XYZ, where RGB of ones is the white point."""
    points = [(x, y, 1 - x - y) for x, y in zip(primaries[0:6:2], primaries[1:6:2], strict=True)]
    columns = np.array(points).T  # [XYZ, RGB]
    return columns * np.linalg.solve(columns, _white(primaries))
