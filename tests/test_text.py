"""The word encoder of `nano`: stable buckets, masked padding, zero rows, gradients."""

import subprocess
import sys

import pytest
import torch

from swifti2v.engine.errors import ProfileError
from swifti2v.engine.text import WordEncoder, split_words

BUCKETS = [[650, 3299, 3447, 0]]  # of "slow zoom in" among 4096


@pytest.fixture
def encoder() -> WordEncoder:
    torch.manual_seed(0)
    model = WordEncoder(vocabulary=64, text_dim=16, text_len=8).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def test_words_are_lower_case_and_no_script_vanishes():
    assert split_words("  Slow ZOOM-in, ｃａｍｅｒａ pans!  ") == ["slow", "zoom", "in", "camera", "pans"]
    assert split_words("Собака бежит") == ["собака", "бежит"]
    assert split_words("慢速 推进") == ["慢速", "推进"]
    assert split_words(" ... ") == []


def test_buckets_are_those_of_the_shipped_weights():
    """Written down, and computed in another process, because a change would silently break trained weights."""
    assert WordEncoder(4096, 8, 4).tokenize(["slow zoom in"]).tolist() == BUCKETS
    code = "from swifti2v.engine.text import WordEncoder as W; print(W(4096, 8, 4).tokenize(['slow zoom in']).tolist())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(BUCKETS)


def test_tokens_stay_in_range_pad_with_zero_and_cut_at_text_len(encoder: WordEncoder):
    long = " ".join(f"word{i}" for i in range(100))
    tokens = encoder.tokenize(["one two", long, ""])
    assert tokens.shape == (3, 8)
    assert tokens.dtype == torch.int64
    assert (tokens[0] > 0).tolist() == [True] * 2 + [False] * 6
    assert (tokens[1] > 0).all()
    assert tokens.max() < 64
    assert not tokens[2].any()
    assert torch.equal(tokens[1], encoder.tokenize([" ".join(long.split()[:8])])[0])


def test_smallest_vocabulary():
    assert WordEncoder(2, 8, 4).tokenize(["a b"]).tolist() == [[1, 1, 0, 0]]
    with pytest.raises(ProfileError, match="got 1, want 2 or more"):
        WordEncoder(1, 8, 4)


@pytest.mark.parametrize("text_dim", [6, 16, 128])
def test_rows_past_the_prompt_are_zero(text_dim: int):
    model = WordEncoder(64, text_dim, 8)
    rows = model.encode("camera pans left")
    assert rows.shape == (1, 8, text_dim)
    assert rows.dtype == torch.float32
    assert rows[0, :3].abs().sum(-1).gt(0).all()
    assert not rows[0, 3:].any()


def test_an_empty_prompt_is_all_zero_and_trains_without_nan(encoder: WordEncoder):
    assert torch.equal(encoder.encode(" "), torch.zeros(1, 8, 16))
    encoder(encoder.tokenize(["", "zoom in"])).square().sum().backward()
    gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)
    assert any(g.abs().sum() > 0 for g in gradients)


def test_a_prompt_does_not_depend_on_its_batch_or_on_padding(encoder: WordEncoder):
    alone = encoder.encode("zoom in")
    together = encoder(encoder.tokenize(["zoom in", "a b c d e f g h"]))[:1]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        encoder.positions[2:] += 3.0  # rows that only padding has
        torch.testing.assert_close(encoder.encode("zoom in"), alone, rtol=1e-5, atol=1e-6)


def test_order_and_words_matter(encoder: WordEncoder):
    left, right = encoder.encode("pan left then right"), encoder.encode("pan right then left")
    assert (left - right).abs().max() > 1e-2
    assert (encoder.encode("zoom in")[0, 0] - encoder.encode("zoom out")[0, 0]).abs().max() > 1e-3  # attention mixes


def test_encode_keeps_no_graph_and_follows_the_weights_dtype(encoder: WordEncoder):
    assert not encoder.encode("zoom").requires_grad
    assert encoder(encoder.tokenize(["zoom"])).requires_grad
    full = encoder.encode("zoom in slowly")
    half = encoder.to(torch.bfloat16).encode("zoom in slowly")
    assert half.dtype == torch.float32
    assert (half - full).norm() / full.norm() < 3e-2
