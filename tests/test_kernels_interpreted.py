"""Every Triton kernel in Triton's interpreter on a CPU, against its eager form.

The interpreter is chosen when a module is imported, so the kernels run in a process of their own. Its bf16 products
are wrong, so types are fp32 and fp16.
"""

import multiprocessing
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from conftest import randomise
from torch import Tensor

from swifti2v.engine.profile import VAEConfig
from swifti2v.engine.vae import VAE
from swifti2v.engine.vae_layers import ChannelNorm
from swifti2v.kernels import modulation, pixels, subpixel, vae_norm, window_attention
from swifti2v.kernels import modulation_triton as modulation_kernels
from swifti2v.kernels import pixels_triton as pixel_kernels
from swifti2v.kernels import subpixel_triton as subpixel_kernels
from swifti2v.kernels import vae_norm_triton as vae_kernels
from swifti2v.kernels import window_attention_triton as attention_kernels
from swifti2v.kernels.dispatch import ChoiceTable
from swifti2v.kernels.kernel_set import fused
from swifti2v.runtime.fused import give_kernels, twin

DTYPES = (torch.float32, torch.float16)
Interpret = Callable[..., Any]


@pytest.fixture(scope="module")
def interpret() -> Iterator[Interpret]:
    """Calls a function of a kernel module in a process where Triton interprets: `interpret(function, *arguments)`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(torch.set_num_threads, 1).result()  # starts the process
    with pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.fixture(params=DTYPES, ids=["fp32", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    torch.manual_seed(0)
    return request.param


def near(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    limit = 2e-6 if got.dtype == torch.float32 else 1e-3
    assert float((got.double() - want.double()).norm() / want.double().norm()) <= limit


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
@pytest.mark.parametrize("seed", range(2))
def test_attention(interpret: Interpret, dtype: torch.dtype, tma: bool, seed: int):
    choose = random.Random(seed)
    batch, heads, dim = choose.choice([1, 2]), choose.choice([1, 3]), choose.choice([16, 32])
    queries, tokens, context = (choose.randint(1, 40) for _ in range(3))
    tile = attention_kernels.Tile(16, 16, 4, 1, tma)
    q, k = torch.randn(batch, heads, queries, dim, dtype=dtype), torch.randn(batch, heads, tokens, dim, dtype=dtype)
    v = torch.randn(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)
    pair = torch.randn(2, batch, heads, context, dim, dtype=dtype)
    for context_k, context_v in ((pair[0], pair[1]), (None, None)):
        got = interpret(attention_kernels.attend, q, k, v, context_k, context_v, tile)
        near(got, window_attention.attend_eager(q, k, v, context_k, context_v))


def test_attention_with_whole_tiles_and_scores_far_from_zero(interpret: Interpret, dtype: torch.dtype):
    q, k, v = torch.randn(3, 1, 2, 32, 16, dtype=dtype)
    k = 20 * k - 30 * q.mean()
    tile = attention_kernels.Tile(16, 16, 4, 1)
    got = interpret(attention_kernels.attend, q, k, v, k[:, :, :16], v[:, :, :16], tile)
    near(got, window_attention.attend_eager(q, k, v, k[:, :, :16], v[:, :, :16]))


@pytest.mark.parametrize(("tokens", "heads", "dim"), [(13, 3, 16), (8, 2, 12)])
def test_norm_and_rotation(interpret: Interpret, dtype: torch.dtype, tokens: int, heads: int, dim: int):
    x = torch.randn(2, tokens + 2, heads * dim, dtype=dtype)[:, 2:]  # a view, as after pruning
    weight, tables = torch.randn(heads * dim, dtype=dtype), torch.randn(2, tokens, dim // 2)
    buffer = torch.zeros(2, heads, tokens + 5, dim, dtype=dtype)
    for cos, sin in ((tables[0], tables[1]), (None, None)):
        got = interpret(attention_kernels.norm_rope, x, weight, cos, sin, buffer[:, :, 5:], heads, 1e-6)
        near(got, window_attention.norm_rope_eager(x, weight, cos, sin, heads, 1e-6))


def test_modulation(interpret: Interpret, dtype: torch.dtype):
    x = torch.randn(2, 4, 11, 40, dtype=dtype)[:, -3:]
    y = torch.randn(2, 3, 11, 40, dtype=dtype)
    shift, scale, gate, *_ = torch.randn(2, 3, 6, 40).unbind(2)
    weight, bias = torch.randn(2, 40, dtype=dtype)
    got = interpret(modulation_kernels.modulated_norm, x, scale, shift, 1e-6)
    near(got, modulation.modulated_norm_eager(x, scale, shift, 1e-6))
    got = interpret(modulation_kernels.gated_residual, x, y, gate)
    near(got, modulation.gated_residual_eager(x, y, gate))
    for gates, rows in ((gate, (scale, shift)), (None, (scale, shift)), (gate, (weight, bias))):
        got = interpret(modulation_kernels.residual_norm, x, y, gates, *rows, 1e-6)
        for one, other in zip(got, modulation.residual_norm_eager(x, y, gates, *rows, 1e-6), strict=True):
            near(one, other)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_norm_and_silu_behind_history(interpret: Interpret, dtype: torch.dtype, layout: torch.memory_format):
    x = torch.randn(2, 20, 2, 5, 7, dtype=dtype).contiguous(memory_format=layout)
    gamma = torch.randn(20, 1, 1, 1, dtype=dtype)
    want = torch.randn(2, 20, 4, 5, 7, dtype=dtype).to(memory_format=torch.channels_last_3d)
    extended = want.clone()
    vae_norm.norm_silu_into_eager(x, gamma, want[:, :, 2:])
    got = interpret(vae_kernels.norm_silu_into, x, gamma, extended[:, :, 2:])
    near(got, want[:, :, 2:])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_subpixel_convolution(interpret: Interpret, dtype: torch.dtype, layout: torch.memory_format):
    x = torch.randn(1, 20, 3, 7, dtype=dtype).contiguous(memory_format=layout)
    weights = subpixel.subpixel_weights(torch.randn(24, 20, 3, 3, dtype=dtype) / 13)
    bias = torch.randn(24, dtype=dtype)
    tile = subpixel_kernels.ConvTile(16, 32, 16, 4, 1)
    got = interpret(subpixel_kernels.subpixel_conv, x, weights, bias, tile)
    assert got.is_contiguous(memory_format=torch.channels_last)
    near(got, subpixel.subpixel_conv_eager(x, weights, bias))


def test_a_vae_by_its_kernels(interpret: Interpret, monkeypatch: pytest.MonkeyPatch):
    """A stream of four calls, where the kernels that a GPU would launch write behind history and between pixels."""
    config = VAEConfig(3, 4, 4, (0.0,) * 3, (1.0,) * 3, mult=(1, 2), res_blocks=1, temporal=(True,), residual=True)
    plain = VAE(config)
    randomise(plain, 1)
    other = twin(plain)
    give_kernels({"vae": other}, fused(ChoiceTable(), "cpu"))
    assert isinstance(other, VAE)
    tile = subpixel_kernels.ConvTile(16, 16, 16, 4, 1)
    launched = []

    def run(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        launched.append(function.__name__)
        return interpret(function, *arguments)

    monkeypatch.setattr(
        vae_norm, "norm_silu_into", lambda x, g, out: out.copy_(run(vae_kernels.norm_silu_into, x, g, out))
    )
    monkeypatch.setattr(subpixel, "subpixel_conv", lambda *given: run(subpixel_kernels.subpixel_conv, *given, tile))
    latents = torch.randn(1, 3, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        near(other.decode(latents), plain.decode(latents))
    assert launched.count("subpixel_conv") == 4
    assert launched.count("norm_silu_into") == 4 * sum(isinstance(m, ChannelNorm) for m in plain.decoder.modules()) - 4


@pytest.mark.parametrize("patch", [1, 2])
def test_bytes_to_the_last_bit(interpret: Interpret, dtype: torch.dtype, patch: int):
    x = (1.2 * torch.randn(1, 3 * patch**2, 2, 3, 180)).to(dtype)  # a row is more than one program
    for value in (0.5, float("nan")):
        x[0, 2, 1, 1, 4] = value
        got, want = interpret(pixel_kernels.to_bytes, x, patch), pixels.to_bytes_eager(x, patch)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
