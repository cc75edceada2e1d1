"""The cost of a training step at real size, against what is known of it."""

from dataclasses import replace

import pytest

from swifti2v.engine.presets import SWIFTI2V_STAGE2, WAN21_I2V_14B, WAN22_I2V_A14B
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


def test_image_tokens_cost_what_their_attention_does():
    """Wan2.1 beside an expert of Wan2.2, which differs by the CLIP tokens alone: 257 more keys for every query."""
    layers, dim, tokens = 2, 5120, 3 * 22 * 40
    configs = (replace(config, layers=layers) for config in (WAN21_I2V_14B, WAN22_I2V_A14B))
    with_tokens, without = (step_cost(config, (3, 44, 80), 32) for config in configs)
    product = 2 * tokens * 257 * dim  # operations of queries by keys, and of scores by values
    # Two forward passes, as blocks are checkpointed, of two products; the gradient of the queries takes two more.
    assert with_tokens.tflop - without.tflop == pytest.approx(layers * 6 * product / 1e12, rel=0.01)
    weights = layers * (2 * dim * dim + 3 * dim) + 1280 * 1280 + 1280 * dim + 3 * 1280 + 3 * dim
    assert with_tokens.weights - without.weights == pytest.approx(weights * 2 / 1e9, rel=1e-3)
    keys = layers * 2 * 257 * dim * 2 / 1e9  # and values, in bf16
    assert with_tokens.kept - without.kept == pytest.approx(keys, rel=0.05)
    assert with_tokens.trained == without.trained
