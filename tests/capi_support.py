"""Sessions of the flat calls, for tests."""

import json

import numpy as np

from swifti2v.runtime import capi
from swifti2v.runtime.capi import Pixels, Status

SMALL = {
    "profile": "tiny", "size": [128, 64], "frames": 37, "stage1_steps": 1, "stage2_steps": 1, "device": "cpu",
    "dtype": "fp32",
}  # fmt: skip
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)


def pixels(image: np.ndarray = PICTURE) -> Pixels:
    return Pixels(image.tobytes(), image.shape[1], image.shape[0])


def opened(**changes: object) -> int:
    status, handle = capi.create(json.dumps({**SMALL, **changes}))
    assert status == Status.OK, capi.last_error()
    assert isinstance(handle, int)
    return handle
