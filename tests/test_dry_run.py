"""The cost of a training step at real size, against what is known of it."""

import pytest

from swifti2v.engine.presets import SWIFTI2V_STAGE2
from swifti2v.training.dry_run import step_cost

WINDOW = (5, 88, 160)
FORWARD = 271.0  # TFLOP of a 5-block window with text keys and values and time tables made inside
OUTSIDE = 1.8  # of which those, about


@pytest.fixture(scope="module")
def costs():
    return {
        (rank, checkpointed): step_cost(SWIFTI2V_STAGE2, WINDOW, rank, checkpointed)
        for rank, checkpointed in ((None, False), (None, True), (32, True))
    }


def test_a_full_step_is_three_forwards_and_checkpointing_adds_one(costs):
    assert costs[None, False].tflop == pytest.approx(3 * (FORWARD - OUTSIDE), rel=0.01)
    assert costs[None, True].tflop == pytest.approx(4 * (FORWARD - OUTSIDE), rel=0.01)
    assert costs[32, True].tflop < costs[None, True].tflop


def test_memory_is_what_the_parts_hold(costs):
    full, lora = costs[None, True], costs[32, True]
    assert full.tokens == 17_600
    assert full.weights == pytest.approx(10.0, rel=0.01)
    assert full.trained == pytest.approx(5_000_377_536 * 20 / 1e9)
    pairs = 30 * 32 * (8 * 2 * 3072 + 2 * (3072 + 14336))
    assert lora.trained == pytest.approx(pairs * 20 / 1e9)
    inputs = 30 * 17_600 * 3072 * 2 / 1e9  # each block's input in bf16
    assert inputs < full.kept < 1.3 * inputs
    assert costs[None, False].kept > 20 * full.kept
