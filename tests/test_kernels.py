"""The eager forms of the fused kernels against what the engine computes, and the ops on a CPU."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import to_frames
from torch import Tensor

from swifti2v.engine.dit import SelfAttention
from swifti2v.engine.profile import DiTConfig
from swifti2v.engine.vae_layers import CausalConv, ChannelNorm, Tape, unpatchify
from swifti2v.kernels.attention import attention
from swifti2v.kernels.dispatch import ChoiceTable
from swifti2v.kernels.kernel_set import EAGER, fused
from swifti2v.kernels.modulation import gated_residual, modulated_norm, residual_norm
from swifti2v.kernels.norm import gated_residual as gate_reference
from swifti2v.kernels.norm import modulated_layer_norm
from swifti2v.kernels.pixels import to_bytes
from swifti2v.kernels.subpixel import (
    subpixel_conv,
    subpixel_conv_eager,
    subpixel_weights,
    upsample_conv,
    upsample_conv_eager,
)
from swifti2v.kernels.vae_norm import norm_silu_conv, norm_silu_conv_eager, norm_silu_into
from swifti2v.kernels.window_attention import attend, attend_eager, norm_rope, norm_rope_eager, norm_rope_into


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def near(got: Tensor, want: Tensor, limit: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert float((got.double() - want.double()).norm() / want.double().norm()) <= limit


# --- window attention


@torch.no_grad()
@pytest.mark.parametrize("queries", [21, 12])
def test_the_pieces_make_the_engines_self_attention(queries: int):
    config = DiTConfig(dim=48, ffn_dim=40, heads=3, layers=1, in_channels=6, out_channels=6, text_dim=8, text_len=4)
    layer = SelfAttention(config)
    layer.norm_q.weight.uniform_(0.5, 1.5)
    layer.norm_k.weight.uniform_(0.5, 1.5)
    x, (cos, sin) = torch.randn(2, 21, 48), torch.randn(2, 21, 8)
    asked = layer.q(x[:, -queries:])
    q = EAGER.norm_rope(asked, layer.norm_q.weight, cos[-queries:], sin[-queries:], 3, config.eps)
    k = EAGER.norm_rope(layer.k(x), layer.norm_k.weight, cos, sin, 3, config.eps)
    v = layer.split(layer.v(x))
    want = layer(x, cos, sin, None, queries)
    near(layer.o(EAGER.attend(q, k, v).flatten(2)), want)
    context = [t[:, :, :9] for t in (k, v)]
    near(layer.o(EAGER.attend(q, k[:, :, 9:], v[:, :, 9:], *context).flatten(2)), want)


def test_norm_without_tables_does_not_rotate():
    x, weight = torch.randn(2, 5, 24), torch.rand(24)
    want = F.rms_norm(x, (24,), weight, 1e-6).view(2, 5, 3, 8).transpose(1, 2)
    near(norm_rope(x, weight, None, None, 3, 1e-6), want)


def test_norm_rope_writes_into_a_slice_and_nowhere_else():
    x, weight, (cos, sin) = torch.randn(2, 5, 24), torch.rand(24), torch.randn(2, 5, 4)
    buffer = torch.full((2, 3, 9, 8), 7.0)
    norm_rope_into(buffer[:, :, 4:], x, weight, cos, sin, 3, 1e-6)
    near(buffer[:, :, 4:], norm_rope_eager(x, weight, cos, sin, 3, 1e-6), 0)
    assert bool((buffer[:, :, :4] == 7).all())


# --- modulation


def modulation_inputs() -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """x (a view, as after pruning) and y [2, 3, 5, 16], and six rows [2, 3, 16] that are views of one table."""
    return torch.randn(2, 4, 5, 16)[:, -3:], torch.randn(2, 3, 5, 16), torch.randn(2, 3, 6, 16).unbind(2)


def test_residual_norm_is_a_residual_and_a_norm():
    x, y, (shift, scale, gate, *_) = modulation_inputs()
    total, normed = residual_norm(x, y, gate, scale, shift, 1e-6)
    near(total, x + gate[:, :, None] * y)
    near(normed, F.layer_norm(total, (16,), eps=1e-6) * (1 + scale[:, :, None]) + shift[:, :, None])
    near(normed, modulated_layer_norm(gate_reference(x, y, gate), scale, shift, 1e-6), 0)
    total, normed = residual_norm(x, y, None, scale, shift, 1e-6)
    near(total, x + y)
    near(normed, modulated_norm(x + y, scale, shift, 1e-6))


def test_one_axis_of_weights_is_an_ordinary_layer_norm():
    x, y, _ = modulation_inputs()
    weight, bias = torch.randn(2, 16)
    near(modulated_norm(x, weight, bias, 1e-6), F.layer_norm(x, (16,), weight, bias, 1e-6), 0)
    near(residual_norm(x, y, None, weight, bias, 1e-6)[1], F.layer_norm(x + y, (16,), weight, bias, 1e-6), 0)


# --- VAE


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("frames", [1, 2])
def test_norm_silu_and_the_causal_convolution_frame_by_frame(layout: torch.memory_format, frames: int):
    norm, conv = ChannelNorm(6, 3), CausalConv(6, 10)
    norm.gamma.uniform_(0.5, 1.5)
    video = torch.randn(2, 6, 7, 5, 4).contiguous(memory_format=layout)
    want = conv(F.silu(F.normalize(video, dim=1) * 6**0.5 * norm.gamma), Tape(None))
    for run in (norm_silu_conv, norm_silu_conv_eager):
        made, history = [], None
        for x in video.split(frames, dim=2):
            y, history = run(x, norm.gamma, conv.weight, conv.bias, history)
            made.append(y)
        near(torch.cat(made, dim=2), want)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (4, 3)])
def test_four_small_convolutions_are_upsampling_and_a_convolution_borders_included(height: int, width: int):
    x = torch.randn(2, 5, height, width, dtype=torch.float64)
    weight, bias = torch.randn(7, 5, 3, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    weights = subpixel_weights(weight)
    assert weights.shape == (2, 2, 2, 2, 5, 7)
    given = (subpixel_conv_eager(x, weights, bias), subpixel_conv(x, weights, bias))
    for got in (*given, upsample_conv(x, weight, bias, weights), upsample_conv(x, weight, bias)):
        torch.testing.assert_close(got, upsample_conv_eager(x, weight, bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_the_runtimes_frames(patch: int, dtype: torch.dtype):
    x = (1.5 * torch.randn(1, 3 * patch**2, 2, 4, 5)).to(dtype)
    frames, broken = to_bytes(x, patch)
    assert int(broken) == 0
    assert frames.shape == (1, 2, 4 * patch, 5 * patch, 3)
    want = to_frames(unpatchify(x, patch).clamp(-1, 1))
    assert (frames[0].numpy() == want).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bytes_tell_of_values_that_are_not_finite(bad: float):
    x = torch.rand(1, 12, 1, 2, 2)
    x[0, 7, 0, 1, 0] = bad
    frames, broken = to_bytes(x, 2)
    assert int(broken) == 1
    assert int((frames == 0).sum()) == 1


# --- the ops


def op_calls() -> dict[str, tuple]:
    q, v = torch.randn(2, 3, 6, 8), torch.randn(2, 6, 3, 8).transpose(1, 2)
    x, weight, (cos, sin) = torch.randn(2, 6, 24), torch.rand(24), torch.randn(2, 6, 4)
    h, y, (shift, scale, gate, *_) = modulation_inputs()
    frame, out = torch.randn(1, 4, 1, 3, 5), torch.zeros(1, 4, 1, 3, 5).to(memory_format=torch.channels_last_3d)
    return {
        "norm_rope": (norm_rope, (x, weight, cos, sin, 3, 1e-6)),
        "norm_rope_into": (norm_rope_into, (torch.zeros(2, 3, 9, 8)[:, :, 3:], x, weight, None, None, 3, 1e-6)),
        "attend": (attend, (q, q, v, None, None)),
        "attend-context": (attend, (q[:, :, :2], q, v, q[:, :, :4], v[:, :, :4])),
        "modulated_norm": (modulated_norm, (h, scale, shift, 1e-6)),
        "gated_residual": (gated_residual, (h, y, gate)),
        "residual_norm": (residual_norm, (h, y, gate, scale, shift, 1e-6)),
        "residual_norm-plain": (residual_norm, (h, y, None, weight[:16], weight[-16:], 1e-6)),
        "norm_silu_into": (norm_silu_into, (frame, torch.rand(4, 1, 1, 1), out)),
        "subpixel_conv": (
            subpixel_conv,
            (torch.randn(2, 5, 3, 4), subpixel_weights(torch.randn(6, 5, 3, 3)), torch.randn(6)),
        ),
        "to_bytes": (to_bytes, (torch.randn(1, 12, 2, 3, 4), 2)),
    }


@pytest.mark.parametrize("name", op_calls())
def test_schema_and_fake_form_of_the_op(name: str):
    op, arguments = op_calls()[name]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    results = torch.library.opcheck(op, arguments, test_utils=tests)
    assert set(results.values()) == {"SUCCESS"}


def test_eager_attention_matches_the_definition():
    q, k, v = torch.randn(3, 2, 3, 6, 8)
    near(attend_eager(q, k, v), attention(q, k, v).transpose(1, 2), 0)


def test_both_sets_take_the_same_and_give_the_same_on_a_cpu():
    ops = fused(ChoiceTable(), "a GPU nobody measured")
    x, weight, (cos, sin) = torch.randn(2, 6, 24), torch.rand(24), torch.randn(2, 6, 4)
    q, k = (kernels.norm_rope(x, weight, cos, sin, 3, 1e-6) for kernels in (EAGER, ops))
    near(k, q, 0)
    near(ops.attend(q, k, k), EAGER.attend(q, k, k), 0)
    near(ops.attend(q, k, k, q, k), EAGER.attend(q, k, k, q, k), 0)
    h, y, (shift, scale, gate, *_) = modulation_inputs()
    near(ops.modulated_norm(h, scale, shift, 1e-6), EAGER.modulated_norm(h, scale, shift, 1e-6), 0)
    near(ops.gated_residual(h, y, gate), EAGER.gated_residual(h, y, gate), 0)


def test_the_package_needs_no_triton():
    """Every op is there and runs on a CPU where triton cannot be imported."""
    program = """
import sys
sys.modules["triton"] = None
import torch
from swifti2v.kernels.kernel_set import EAGER, fused
from swifti2v.kernels.modulation import gated_residual
assert torch.equal(gated_residual(*torch.ones(2, 1, 1, 1, 4), torch.ones(1, 1, 4)), torch.full((1, 1, 1, 4), 2.0))
"""
    subprocess.run([sys.executable, "-c", program], check=True)
