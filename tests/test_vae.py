"""The VAEs against diffusers' AutoencoderKLWan, streamed in chunks of every size, and their sizes at 2K."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from swifti2v.engine import vae_layers
from swifti2v.engine.errors import SpecError
from swifti2v.engine.presets import WAN21_VAE, WAN22_VAE
from swifti2v.engine.profile import VAEConfig
from swifti2v.engine.vae import VAE
from swifti2v.engine.weights import load_vae

Z = 4
FORMS = {
    "wan21": {"base_dim": 8},
    "wan22": {"base_dim": 8, "decoder_base_dim": 12, "is_residual": True, "patch_size": 2},
    # Not a public model: other depths, and time halved first.
    "wan21-odd": {"base_dim": 6, "dim_mult": [1, 3, 2], "num_res_blocks": 1, "temperal_downsample": [True, False]},
    "wan22-odd": {
        "base_dim": 8,
        "is_residual": True,
        "num_res_blocks": 1,
        "temperal_downsample": [True, True, False],  # time also doubles where channels shrink
    },
}


def randomise(model: nn.Module, seed: int) -> None:
    """Give every parameter a value that a mistake would show, keeping activations near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim > 1:
                gain = 0.3 if name.startswith("decoder.conv_out") else 1.0  # most pixels inside [-1, 1]
                parameter.copy_(gain * noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise)


Pair = tuple[Any, VAE, Path]  # diffusers' model, ours, and the folder both came from


@pytest.fixture(scope="module", params=FORMS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    form = FORMS[request.param]
    channels = 3 * form.get("patch_size", 1) ** 2
    theirs = AutoencoderKLWan(
        z_dim=Z,
        latents_mean=[0.3, -0.2, 0.1, 0.7],
        latents_std=[0.5, 1.5, 2.0, 0.8],
        in_channels=channels,
        out_channels=channels,
        **form,
    ).eval()
    randomise(theirs, 1)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, load_vae(folder), folder


@pytest.fixture
def video(pair: Pair) -> Tensor:
    """21 frames: six blocks or more, of 5 x 7 cells (3 x 5 where cells are large)."""
    config = pair[1].config
    rows, columns = (3, 5) if config.spatial > 8 else (5, 7)
    generator = torch.Generator().manual_seed(2)
    shape = (1, 3, 21, rows * config.spatial, columns * config.spatial)
    return torch.rand(shape, generator=generator) * 2 - 1


@pytest.fixture
def latents(pair: Pair) -> Tensor:
    rows, columns = (3, 5) if pair[1].config.spatial > 8 else (5, 7)
    return torch.randn(1, Z, 6, rows, columns, generator=torch.Generator().manual_seed(3))


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@torch.no_grad()
def test_encode_equals_diffusers(pair: Pair, video: Tensor):
    theirs, ours, _ = pair
    mode = theirs.encode(video).latent_dist.mode()
    want = (mode - torch.tensor([0.3, -0.2, 0.1, 0.7]).view(1, Z, 1, 1, 1)) / ours.std
    got = ours.encode(video)
    assert got.shape == want.shape
    assert 0.1 < float(mode.std()) < 10
    assert relative(got, want) <= 1e-5


@torch.no_grad()
def test_decode_equals_diffusers(pair: Pair, latents: Tensor):
    theirs, ours, _ = pair
    want = theirs.decode(latents * ours.std + ours.mean).sample
    got = ours.decode(latents)
    assert got.shape == want.shape
    assert float((want.abs() == 1).double().mean()) < 0.2, "clipping would hide differences"
    assert float(want.std()) > 0.1
    assert relative(got, want) <= 1e-5


def stream(vae: VAE, way: str, x: Tensor, chunk: int, donate: bool = False) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run x through in calls of `chunk` blocks after the first; returns the result and the last caches."""
    run = vae.encode_chunk if way == "encode" else vae.decode_chunk
    y, caches = run(x[:, :, :1], None)
    shapes = [cache.shape for cache in caches]
    out = [y]
    for part in x[:, :, 1:].split(chunk * (vae.config.time if way == "encode" else 1), dim=2):
        y, caches = run(part, caches, donate)
        assert [cache.shape for cache in caches] == shapes, "caches never change shape"
        out.append(y)
    return torch.cat(out, dim=2), caches


@torch.no_grad()
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_the_size_of_a_call_changes_no_value(pair: Pair, video: Tensor, latents: Tensor, way: str):
    _, ours, _ = pair
    x = video if way == "encode" else latents
    want, want_caches = stream(ours, way, x, 1)
    torch.testing.assert_close(want, ours.encode(x) if way == "encode" else ours.decode(x), rtol=0, atol=0)
    for chunk in (2, 5):
        got, caches = stream(ours, way, x, chunk)
        assert relative(got, want) <= 1e-5
        for a, b in zip(caches, want_caches, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_donated_caches_give_the_same_bits(pair: Pair, video: Tensor, latents: Tensor, way: str):
    _, ours, _ = pair
    x = video if way == "encode" else latents
    want, want_caches = stream(ours, way, x, 1)
    got, caches = stream(ours, way, x, 1, donate=True)
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(caches, want_caches, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("way", ["encode", "decode"])
@pytest.mark.parametrize("donate", [False, True])
def test_frames_run_one_by_one_as_at_2k(
    pair: Pair, video: Tensor, latents: Tensor, way: str, donate: bool, monkeypatch: pytest.MonkeyPatch
):
    _, ours, _ = pair
    x = video if way == "encode" else latents
    want, want_caches = stream(ours, way, x, 2)
    monkeypatch.setattr(vae_layers, "TOGETHER", 1)
    got, caches = stream(ours, way, x, 2, donate)
    assert relative(got, want) <= 1e-5
    for a, b in zip(caches, want_caches, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_donated_caches_are_updated_in_place_and_others_are_left(pair: Pair, latents: Tensor):
    _, ours, _ = pair
    _, caches = ours.decode_chunk(latents[:, :, :1], None)
    before = [cache.clone() for cache in caches]
    _, fresh = ours.decode_chunk(latents[:, :, 1:2], caches)
    assert all(torch.equal(a, b) for a, b in zip(caches, before, strict=True))
    assert not {c.data_ptr() for c in fresh} & {c.data_ptr() for c in caches}
    _, donated = ours.decode_chunk(latents[:, :, 1:2], caches, donate=True)
    assert [c.data_ptr() for c in donated] == [c.data_ptr() for c in caches]


@torch.no_grad()
def test_caches_hold_no_more_memory_than_their_shape(pair: Pair, latents: Tensor):
    _, ours, _ = pair
    _, caches = stream(ours, "decode", latents, 5)
    assert all(cache.untyped_storage().nbytes() == cache.nbytes for cache in caches)


@torch.no_grad()
def test_bf16_stays_near_fp32_and_statistics_stay_fp32(pair: Pair, video: Tensor, latents: Tensor):
    _, ours, folder = pair
    half = load_vae(folder, dtype=torch.bfloat16)
    assert half.mean.dtype == half.std.dtype == torch.float32
    assert torch.equal(half.mean, ours.mean)
    assert relative(half.decode(latents.bfloat16()), ours.decode(latents)) <= 5e-2
    assert relative(half.encode(video.bfloat16()), ours.encode(video)) <= 5e-2


def test_a_video_off_the_grid_is_refused(pair: Pair, video: Tensor):
    _, ours, _ = pair
    for wrong in (video[:, :, :-1], video[..., :-1], video[:, :, :, 1:]):
        with pytest.raises(SpecError, match="frames and sides that are multiples"):
            ours.encode(wrong)


def on_meta(config: VAEConfig, dtype: torch.dtype = torch.bfloat16) -> VAE:
    with torch.device("meta"):
        return VAE(config).to(dtype)


def caches_on_meta(vae: VAE, width: int, height: int) -> tuple[list[Tensor], list[Tensor]]:
    """The encoder's and the decoder's caches after a later call, equal in shape to those of the first."""
    cell, z = vae.config.spatial, vae.config.latent_channels
    pixels = torch.empty(1, 3, 5, height, width, dtype=torch.bfloat16, device="meta")
    latents = torch.empty(1, z, 2, height // cell, width // cell, dtype=torch.bfloat16, device="meta")
    return list(stream(vae, "encode", pixels, 1)[1]), list(stream(vae, "decode", latents, 1)[1])


def gigabytes(tensors: list[Tensor]) -> float:
    return sum(t.nbytes for t in tensors) / 1e9


@pytest.mark.parametrize(
    ("config", "width", "height", "encoder", "decoder"),
    [
        (WAN22_VAE, 2560, 1408, 4.243, 12.864),
        (WAN22_VAE, 640, 352, 0.265, 0.804),
        (WAN21_VAE, 2560, 1408, 10.121, 17.046),
        (WAN21_VAE, 640, 352, 0.633, 1.065),
    ],
)
@torch.no_grad()
def test_caches_at_real_size(config: VAEConfig, width: int, height: int, encoder: float, decoder: float):
    down, up = caches_on_meta(on_meta(config), width, height)
    assert (len(down), len(up)) == (24, 32)
    assert (gigabytes(down), gigabytes(up)) == pytest.approx((encoder, decoder), abs=0.0011)


def runs(*pieces: tuple[int, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Shapes, each repeated."""
    return [(1, *shape) for count, shape in pieces for _ in range(count)]


@torch.no_grad()
def test_wan22_cache_slots_at_2k():
    down, up = caches_on_meta(on_meta(WAN22_VAE), 2560, 1408)
    # Without the batch: channels, frames, rows, columns, in the order the layers run.
    assert [tuple(t.shape) for t in down] == runs(
        (1, (12, 2, 704, 1280)),
        (4, (160, 2, 704, 1280)),
        (1, (160, 2, 352, 640)),
        (3, (320, 2, 352, 640)),
        (1, (320, 1, 176, 320)),
        (1, (320, 2, 176, 320)),
        (3, (640, 2, 176, 320)),
        (1, (640, 1, 88, 160)),
        (9, (640, 2, 88, 160)),
    )
    assert [tuple(t.shape) for t in up] == runs(
        (1, (48, 2, 88, 160)),
        (11, (1024, 2, 88, 160)),
        (7, (1024, 2, 176, 320)),
        (1, (1024, 2, 352, 640)),
        (5, (512, 2, 352, 640)),
        (1, (512, 2, 704, 1280)),
        (6, (256, 2, 704, 1280)),
    )
    assert (sum(t.nbytes for t in down), sum(t.nbytes for t in up)) == (4_242_472_960, 12_863_488_000)


@pytest.mark.parametrize(("config", "want"), [(WAN21_VAE, 126_892_531), (WAN22_VAE, 704_688_668)])
def test_parameter_counts_of_the_public_models(config: VAEConfig, want: int):
    assert sum(p.numel() for p in on_meta(config).parameters()) == want


def teraflops(vae: VAE, way: str, width: int, height: int) -> tuple[float, float]:
    """Of the first call and of a later one, as PyTorch counts them; nothing is computed."""
    cell, z = vae.config.spatial, vae.config.latent_channels
    shape = (z, 1, height // cell, width // cell)
    counts, caches = [], None
    for frames in (1, 4):
        chunk = (3, frames, height, width) if way == "encode" else shape
        x = torch.empty(1, *chunk, dtype=torch.bfloat16, device="meta")
        with FlopCounterMode(display=False) as counter:
            _, caches = vae.encode_chunk(x, caches) if way == "encode" else vae.decode_chunk(x, caches)
        counts.append(counter.get_total_flops() / 1e12)
    return counts[0], counts[1]


@pytest.mark.parametrize(
    ("config", "way", "width", "height", "total"),
    [
        (WAN22_VAE, "encode", 2560, 1408, 1034),
        (WAN22_VAE, "decode", 2560, 1408, 5403),
        (WAN21_VAE, "encode", 640, 352, 92.1),
        (WAN21_VAE, "decode", 640, 352, 155),
    ],
)
@torch.no_grad()
def test_flops_of_81_frames(config: VAEConfig, way: str, width: int, height: int, total: float):
    first, later = teraflops(on_meta(config), way, width, height)
    assert first + 20 * later == pytest.approx(total, abs=0.05 if total < 100 else 0.5)
