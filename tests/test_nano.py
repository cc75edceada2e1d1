"""The `nano` profile at its real size, as `make demo` runs it: minutes, so marked slow."""

import json
import os
import subprocess
import sys

import pytest

PEAK = """
import json, resource, sys, time
import numpy as np
from swifti2v import Request, Session, get_profile, load_models
profile = get_profile("nano").override(frames=int(sys.argv[1]))
image = np.zeros((profile.height, profile.width, 3), np.uint8)
started = time.perf_counter()
with Session.open(load_models(profile)) as session:
    count = sum(len(chunk.frames) for chunk in session.generate(Request(image, "slow zoom in")))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"frames": count, "peak_kB": peak, "seconds": time.perf_counter() - started}))
"""


@pytest.mark.slow
@pytest.mark.serial
def test_a_clip_three_times_as_long_needs_no_more_memory(record_property):
    """Peak resident memory of whole processes; the seconds are printed for whoever reads the log."""
    ran = {}
    for frames in (33, 97):
        plain = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}
        command = [sys.executable, "-c", PEAK, str(frames)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
        ran[frames] = json.loads(done.stdout)
        assert ran[frames]["frames"] == frames
    print(ran)
    assert ran[97]["peak_kB"] < 1.05 * ran[33]["peak_kB"], ran
