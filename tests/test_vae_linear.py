"""A VAE with linear maps beside its network: cells, streams, layouts, and maps that start at principal components."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import randomise
from torch import Tensor

from swifti2v.engine.presets import get_profile
from swifti2v.engine.vae import VAE
from swifti2v.engine.vae_layers import from_cells, to_cells
from swifti2v.engine.weights import load_vae, save_vae
from swifti2v.training.vae import fit_linear, freeze_linear, new_vae, psnr

PLAIN = replace(get_profile("tiny").stage2.vae, mult=(1, 2, 2), res_blocks=1, temporal=(True, True), mean=(0.1,) * 6)
CONFIG = replace(PLAIN, linear=True)  # cells of 8x8 pixels and 4 frames


def video(seed: int, frames: int = 9) -> Tensor:
    """Smooth colours that move: [1, 3, frames, 32, 48]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 3, 3, 3, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (frames, 32, 48), mode="trilinear", align_corners=True)
    return (0.4 * smooth).clamp(-1, 1)


def test_cells_hold_all_pixels_of_a_cell():
    pixels = torch.arange(2 * 3 * 4 * 8 * 12, dtype=torch.float32).view(2, 3, 4, 8, 12)
    cells = to_cells(pixels, 4, 2)
    assert cells.shape == (2, 2 * 3 * 16, 2, 2, 3)
    assert set(cells[1, :, 1, 0, 2].tolist()) == set(pixels[1, :, 2:, :4, 8:].flatten().tolist())
    assert torch.equal(from_cells(cells, 4, 2), pixels)


@torch.no_grad()
def test_streams_of_any_size_are_one():
    vae = VAE(CONFIG)
    randomise(vae, 1)
    clip = video(3)
    latents = vae.encode(clip)
    first, caches = vae.encode_chunk(clip[:, :, :1], None)
    rest, _ = vae.encode_chunk(clip[:, :, 1:], caches)
    torch.testing.assert_close(torch.cat((first, rest), dim=2), latents, rtol=1e-4, atol=1e-5)
    pixels = vae.decode(latents)
    first, caches = vae.decode_chunk(latents[:, :, :1], None)
    rest, _ = vae.decode_chunk(latents[:, :, 1:], caches)
    torch.testing.assert_close(torch.cat((first, rest), dim=2), pixels, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(tmp_path: Path):
    vae = VAE(CONFIG)
    randomise(vae, 2)
    save_vae(vae, tmp_path)
    loaded = load_vae(tmp_path)
    assert loaded.config == CONFIG
    assert torch.equal(loaded.encode(video(1)), vae.encode(video(1)))
    save_vae(VAE(PLAIN), tmp_path / "plain")
    assert load_vae(tmp_path / "plain").config == PLAIN


@torch.no_grad()
def test_it_starts_as_the_best_linear_map():
    vae = new_vae(replace(CONFIG, mean=(0.0,) * 6), 0)
    clips = [video(seed) for seed in range(6)]
    fit_linear(vae, clips)
    rows = torch.cat([to_cells(clip[:, :, 1:], 8, 4).transpose(0, 1).flatten(1).T for clip in clips])  # [cells, 768]
    lost = torch.linalg.svdvals(rows.double() - rows.double().mean(0))[6:].square().sum() / rows.numel()
    error = torch.cat([vae.decode(vae.encode(clip))[:, :, 1:] - clip[:, :, 1:] for clip in clips]).double()
    assert float(error.square().mean()) == pytest.approx(float(lost), rel=0.02)
    still = clips[0][:, :, :1].expand(-1, -1, 9, -1, -1)
    latents = vae.encode(still)
    near = (latents[:, :, 1] - latents[:, :, 0]).norm() / latents[:, :, 0].norm()
    assert float(near) < 0.6, "a still picture: similar latents in the first block and later, not unrelated ones"


def test_the_network_trains_and_the_maps_stay():
    vae = new_vae(CONFIG, 0)
    fit_linear(vae, [video(seed) for seed in range(3)])
    freeze_linear(vae)
    before, state = psnr(vae, [video(9)]), {n: p.clone() for n, p in vae.named_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in state} == {"encoder", "decoder", "quant", "post_quant"}
    optimizer = torch.optim.Adam([p for p in vae.parameters() if p.requires_grad], 1e-3)
    for step in range(30):
        optimizer.zero_grad()
        clip = video(step % 3)
        (vae.decode(vae.encode(clip)) - clip).square().mean().backward()
        optimizer.step()
    assert psnr(vae, [video(0)]) > before or psnr(vae, [video(9)]) > before
    assert all(torch.equal(vae.get_parameter(name), value) for name, value in state.items())
