"""A VAE with linear maps beside its network: cells, streams, layouts, and maps that start at principal components."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import randomise
from stage_clips import round_trip_psnr
from torch import Tensor

from swifti2v.engine.errors import WeightsError
from swifti2v.engine.presets import get_profile
from swifti2v.engine.vae import VAE
from swifti2v.engine.vae_layers import from_cells, to_cells
from swifti2v.engine.weights import load_vae, save_vae
from swifti2v.training.components import fit_linear, freeze_linear, maps_hash
from swifti2v.training.log import TrainingError
from swifti2v.training.vae import finished, new_vae

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
    shutil.copy(tmp_path / "config.json", tmp_path / "plain")
    with pytest.raises(WeightsError, match=r"config\.json linear: got True, want False"):
        load_vae(tmp_path / "plain")  # its maps are lost


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


@torch.no_grad()
def test_components_have_the_root_of_their_deviation():
    """The faintest neither drown nor are most of the latents."""
    vae = new_vae(replace(CONFIG, mean=(0.0,) * 6), 0)
    clips = [video(seed) for seed in range(6)]
    fit_linear(vae, clips)
    latents = torch.cat([vae.encode(clip)[:, :, 1:] for clip in clips]).transpose(0, 1).flatten(1).double()  # [z, n]
    rows = torch.cat([to_cells(clip[:, :, 1:], 8, 4).transpose(0, 1).flatten(1) for clip in clips], dim=1).double()
    deviations = torch.linalg.svdvals(rows - rows.mean(1, keepdim=True))[:6] / rows.shape[1] ** 0.5
    variances = torch.linalg.eigvalsh(latents @ latents.T / latents.shape[1]).flip(0)
    torch.testing.assert_close(variances, deviations, rtol=1e-2, atol=1e-6)


@torch.no_grad()
def test_latents_can_resemble_those_of_another_vae():
    """Of one with the same components, turned otherwise, they are found again."""
    clips = [video(seed) for seed in range(6)]
    known = new_vae(replace(CONFIG, mean=(0.0,) * 6), 0)
    fit_linear(known, clips)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(5))).Q
    assert known.encoder.linear is not None
    for layer in (known.encoder.linear.first, known.encoder.linear.next):
        layer.weight.copy_((turn @ layer.weight.flatten(1)).view_as(layer.weight))
        layer.bias.copy_(turn @ layer.bias)  # type: ignore[union-attr]
    want = known.encode(clips[0])[:, :, 1:]
    found = new_vae(replace(CONFIG, mean=(0.0,) * 6), 1)
    fit_linear(found, clips, like=known)
    assert float((found.encode(clips[0])[:, :, 1:] - want).norm() / want.norm()) < 1e-3
    with pytest.raises(TrainingError, match="VAE to resemble: got 7 channels for 8x8x4, want at most 6 for 8x8x4"):
        fit_linear(found, clips, like=VAE(replace(CONFIG, latent_channels=7, mean=(0.0,) * 7, std=(1.0,) * 7)))


@torch.no_grad()
def test_the_first_channels_can_resemble_those_of_larger_cells():
    """A VAE of 8x8 pixels, shown the clips at twice their size, has the grid of one of 4x4 pixels."""
    clips = [video(seed) for seed in range(6)]
    large = [torch.nn.functional.interpolate(clip, scale_factor=(1, 2, 2), mode="nearest") for clip in clips]
    known = new_vae(replace(CONFIG, latent_channels=4, mean=(0.0,) * 4, std=(1.0,) * 4), 0)
    fit_linear(known, large)
    small = replace(CONFIG, mult=(1, 2, 2), patch=1, residual=False, temporal=(True, True), mean=(0.0,) * 6)
    found = new_vae(small, 1)
    assert (found.config.spatial, found.config.time) == (4, known.config.time)
    fit_linear(found, clips, like=known)
    want, got = known.encode(large[0])[:, :, 1:], found.encode(clips[0])[:, :4, 1:]
    likeness = torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0)
    assert float(likeness) > 0.99, "up to their size: four times the pixels have larger components"


@torch.no_grad()
def test_channels_of_a_finished_linear_vae_have_one_deviation():
    """How much they differ is what the fit chose: each by itself would make the faintest as large as the first."""
    vae = new_vae(replace(CONFIG, mean=(0.0,) * 6), 0)
    clips = [video(seed) for seed in range(6)]
    fit_linear(vae, clips)
    done = finished(vae, clips)
    assert len(set(done.config.std)) == 1
    latents = torch.cat([done.encode(clip) for clip in clips])
    assert float(latents.square().mean()) == pytest.approx(1, rel=0.05)


def test_the_network_trains_and_the_maps_stay():
    vae = new_vae(CONFIG, 0)
    seen = [video(seed) for seed in range(3)]
    fit_linear(vae, seen)
    freeze_linear(vae)
    before, state = round_trip_psnr(vae, seen), {n: p.clone() for n, p in vae.named_parameters() if not p.requires_grad}
    assert all(".linear." in name or name.startswith(("quant.", "post_quant.")) for name in state)
    assert len(state) == 12, "two maps each way, quant and post_quant: a weight and a bias of each"
    optimizer = torch.optim.Adam([p for p in vae.parameters() if p.requires_grad], 1e-3)
    for step in range(30):
        optimizer.zero_grad()
        clip = seen[step % 3]
        (vae.decode(vae.encode(clip)) - clip).square().mean().backward()
        optimizer.step()
    assert round_trip_psnr(vae, seen) > before
    assert all(torch.equal(vae.get_parameter(name), value) for name, value in state.items())


def test_other_maps_have_another_hash():
    first, second = new_vae(CONFIG, 0), new_vae(CONFIG, 0)
    fit_linear(first, [video(0)])
    fit_linear(second, [video(0)])
    assert maps_hash(first) == maps_hash(second)
    fit_linear(second, [video(1)])
    assert maps_hash(first) != maps_hash(second)
