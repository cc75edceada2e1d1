"""Every kernel on a CUDA device, in bf16 too, against its eager form; attention measured and chosen."""

import pytest
import torch
from torch import Tensor

from swifti2v.kernels import modulation, pixels, subpixel, vae_norm, window_attention
from swifti2v.kernels.dispatch import ChoiceTable, Shape, measure, random_inputs, run_backend
from swifti2v.kernels.kernel_set import EAGER, fused
from swifti2v.kernels.launch import capability
from swifti2v.kernels.window_attention_triton import tiles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]
DEVICE = torch.device("cuda")


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    torch.manual_seed(0)
    return request.param


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def near(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    limit = {torch.float16: 2e-3, torch.bfloat16: 1e-2}[got.dtype]
    assert float((got.double() - want.double()).norm() / want.double().norm()) <= limit


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("queries", "tokens", "context"), [(128, 256, 0), (300, 300, 0), (77, 333, 190), (1, 1, 1)])
def test_attention_in_every_tile(dtype: torch.dtype, dim: int, queries: int, tokens: int, context: int):
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    q, k, v, *pair = random_inputs(Shape(2, 3, queries, tokens, context, dim, name), DEVICE)
    wide = [None if tensor is None else tensor.float() for tensor in pair]
    want = window_attention.attend_eager(q.float(), k.float(), v.float(), *wide).to(dtype)
    for tile in tiles(capability(DEVICE)):
        near(run_backend(tile.name, q, k, v, *pair), want)


@pytest.mark.parametrize(("heads", "dim"), [(24, 128), (40, 128), (3, 64), (2, 12)])
def test_norm_and_rotation(dtype: torch.dtype, heads: int, dim: int):
    x, weight = draw(2, 103, heads * dim, dtype=dtype)[:, 2:], draw(heads * dim, dtype=dtype)
    cos, sin = draw(2, 101, dim // 2)
    buffer = torch.zeros(2, heads, 108, dim, device=DEVICE, dtype=dtype)
    for tables in ((cos, sin), (None, None)):
        want = window_attention.norm_rope_eager(x, weight, *tables, heads, 1e-6)
        near(window_attention.norm_rope(x, weight, *tables, heads, 1e-6), want)
        window_attention.norm_rope_into(buffer[:, :, 7:], x, weight, *tables, heads, 1e-6)
        near(buffer[:, :, 7:], want)
    assert not buffer[:, :, :7].any()


@pytest.mark.parametrize("width", [48, 3072, 5120])
def test_modulation(dtype: torch.dtype, width: int):
    x, y = draw(2, 4, 101, width, dtype=dtype)[:, -3:], draw(2, 3, 101, width, dtype=dtype)
    shift, scale, gate, *_ = draw(2, 3, 6, width).unbind(2)
    weight, bias = draw(2, width, dtype=dtype)
    rows = (scale, shift)
    near(modulation.modulated_norm(x, *rows, 1e-6), modulation.modulated_norm_eager(x, *rows, 1e-6))
    near(modulation.gated_residual(x, y, gate), modulation.gated_residual_eager(x, y, gate))
    for gates, pair in ((gate, rows), (None, rows), (gate, (weight, bias))):
        got = modulation.residual_norm(x, y, gates, *pair, 1e-6)
        for one, other in zip(got, modulation.residual_norm_eager(x, y, gates, *pair, 1e-6), strict=True):
            near(one, other)


@pytest.mark.parametrize("channels", [20, 160, 1024])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_norm_silu_and_the_causal_convolution(dtype: torch.dtype, channels: int, layout: torch.memory_format):
    video = draw(1, channels, 5, 9, 14, dtype=dtype).contiguous(memory_format=layout)
    gamma, bias = draw(channels, 1, 1, 1, dtype=dtype), draw(8, dtype=dtype)
    weight = (draw(8, channels, 3, 3, 3) / (27 * channels) ** 0.5).to(dtype)
    old = history = None
    for x in video.split((1, 1, 3), dim=2):
        want, old = vae_norm.norm_silu_conv_eager(x, gamma, weight, bias, old)
        got, history = vae_norm.norm_silu_conv(x, gamma, weight, bias, history)
        near(got, want)
        near(history, old)


@pytest.mark.parametrize(("channels_in", "channels_out"), [(512, 512), (96, 40)])
def test_subpixel_convolution(dtype: torch.dtype, channels_in: int, channels_out: int):
    x = draw(2, channels_in, 13, 21, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = (draw(channels_out, channels_in, 3, 3) / (9 * channels_in) ** 0.5).to(dtype)
    bias = draw(channels_out, dtype=dtype)
    got = subpixel.subpixel_conv(x, subpixel.subpixel_weights(weight), bias)
    assert got.is_contiguous(memory_format=torch.channels_last)
    near(got, subpixel.upsample_conv_eager(x, weight, bias))
    near(subpixel.upsample_conv(x.contiguous(), weight, bias), got)


def test_bytes_to_the_last_bit(dtype: torch.dtype):
    x = (1.2 * draw(1, 12, 2, 33, 200)).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    for value in (0.5, float("nan")):
        x[0, 2, 1, 1, 4] = value
        got, want = pixels.to_bytes(x, 2), pixels.to_bytes_eager(x, 2)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_attention_is_measured_and_chosen():
    shape = Shape(1, 8, 512, 1024, 512, 128, "bf16")
    choice = measure(shape, DEVICE, repeats=5)
    by_name = {timing.backend: timing for timing in choice.timings}
    assert by_name["sdpa"].samples
    for tile in tiles(capability(DEVICE)):
        assert by_name[tile.name].refused == "", by_name[tile.name]
    assert choice.best.milliseconds == min(timing.milliseconds for timing in choice.timings)
    kernels = fused(ChoiceTable((choice,)), torch.cuda.get_device_name())
    inputs = random_inputs(shape, DEVICE)
    near(kernels.attend(*inputs), EAGER.attend(*inputs))


def test_kernels_can_be_captured_in_a_cuda_graph():
    q, k, v, *pair = random_inputs(Shape(1, 3, 200, 300, 100, 128, "bf16"), DEVICE)
    name = tiles(capability(DEVICE))[0].name
    want = window_attention.attend(q, k, v, *pair, name)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = window_attention.attend(q, k, v, *pair, name)
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)
