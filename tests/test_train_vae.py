"""VAE training: streamed like inference, gradients everywhere, statistics that whiten, a loss that falls."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import randomise
from stage_clips import round_trip_psnr
from torch import Tensor

from swifti2v.engine.errors import SpecError
from swifti2v.engine.presets import get_profile
from swifti2v.engine.profile import VAEConfig
from swifti2v.engine.vae import VAE
from swifti2v.engine.weights import load_vae
from swifti2v.training.checkpoint import load_ema
from swifti2v.training.log import TrainingError, read_log
from swifti2v.training.trainer import TrainConfig, ship, step_seed, train
from swifti2v.training.vae import (
    VaeLoss,
    VaeTask,
    finished,
    latent_statistics,
    new_vae,
    posterior,
    reconstruct,
    vae_loss,
)

FORMS = {"wan21": get_profile("tiny").stage1.vae, "wan22": get_profile("tiny").stage2.vae}
FORMS["linear"] = replace(FORMS["wan22"], linear=True)


def clip(step: int, seed: int, frames: int = 9, height: int = 32, width: int = 48) -> Tensor:
    """A colour gradient with a wave that moves: [1, 3, frames, height, width]."""
    draw = torch.rand(3, 3, generator=torch.Generator().manual_seed(step_seed(seed, step)))
    y, x = torch.linspace(-1, 1, height).view(-1, 1), torch.linspace(-1, 1, width)
    t = torch.linspace(0, 1, frames).view(-1, 1, 1)
    channels = [torch.sin(3 * (a * x + b * y + c * t)) * 0.5 + (a - 0.5) for a, b, c in draw.tolist()]
    return torch.stack(channels).clamp(-1, 1).unsqueeze(0)  # 3 x [T, H, W] -> [1, 3, T, H, W]


@pytest.fixture(params=FORMS)
def config(request: pytest.FixtureRequest) -> VAEConfig:
    z = FORMS[request.param].latent_channels
    return replace(
        FORMS[request.param], mean=tuple(0.1 * i for i in range(z)), std=tuple(1 + 0.2 * i for i in range(z))
    )


@torch.no_grad()
def test_training_forward_equals_streaming(config: VAEConfig):
    vae = VAE(config)
    randomise(vae, 1)
    vae.decoder.conv_out.weight *= 3
    for frames in (1, 5, 13):
        video = clip(0, 3, frames)
        mean, logvar = posterior(vae, video)
        assert mean.shape == logvar.shape == (1, config.latent_channels, 1 + frames // 4, *mean.shape[3:])
        want = vae.encode(video)
        torch.testing.assert_close((mean - vae.mean) / vae.std, want, rtol=1e-4, atol=1e-5)
        pixels, decoded = reconstruct(vae, want * vae.std + vae.mean), vae.decode(want)
        assert pixels.shape == video.shape
        assert float(pixels.abs().max()) > 1, "training sees what is outside the range"
        torch.testing.assert_close(pixels.clamp(-1, 1), decoded, rtol=1e-4, atol=1e-4)
    with pytest.raises(SpecError, match=r"got .+, want .+; .+"):
        posterior(vae, video[:, :, :4])


def test_gradient_reaches_every_parameter_and_the_first_frame(config: VAEConfig):
    task = VaeTask(new_vae(config, 0), clip)
    loss, _ = task.loss(0, 1)
    loss.backward()
    dead = [n for n, p in task.vae.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert not dead
    video = clip(0, 1).requires_grad_(True)
    later = reconstruct(task.vae, posterior(task.vae, video)[0])[:, :, 1:].sum()
    assert video.grad is None
    later.backward()
    assert video.grad is not None
    assert float(video.grad[:, :, 0].abs().sum()) > 0, "through the caches"


def test_pixels_out_of_range_still_learn(config: VAEConfig):
    vae = new_vae(config, 0)
    with torch.no_grad():
        assert vae.decoder.conv_out.bias is not None
        vae.decoder.conv_out.bias.fill_(3.0)
    VaeTask(vae, clip, VaeLoss(multiscale=0, gradient=0)).loss(0, 1)[0].backward()
    grad = vae.decoder.conv_out.bias.grad
    assert grad is not None
    assert float(grad.min()) > 0.01


def test_loss_terms_by_hand():
    video = torch.zeros(1, 3, 3, 4, 4)
    pixels = torch.zeros(1, 3, 3, 4, 4)
    pixels[..., ::2, :] = 0.4  # rows alternate
    mean, logvar = torch.full((1, 2, 1, 1, 1), 2.0), torch.zeros(1, 2, 1, 1, 1)
    weights = VaeLoss(pixel=1, multiscale=10, gradient=100, kl=1000)
    total, parts = vae_loss(pixels, video, mean, logvar, weights)
    want = {"pixel": 0.2, "multiscale": 0.4, "gradient": 0.4, "kl": 2.0}
    assert {name: float(part) for name, part in parts.items()} == pytest.approx(want)
    assert float(total) == pytest.approx(0.2 + 4 + 40 + 2000)
    single, _ = vae_loss(pixels[:, :, :1], video[:, :, :1], mean, logvar, weights)
    assert float(single) == pytest.approx(float(total)), "one frame has no difference in time"


def test_the_draw_is_a_function_of_the_seed():
    task = VaeTask(new_vae(FORMS["wan21"], 0), clip)
    values = [float(task.loss(0, seed)[0].detach()) for seed in (1, 1, 2)]
    assert values[0] == values[1] != values[2]
    before = torch.random.get_rng_state()
    other = new_vae(FORMS["wan21"], 0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(other.quant.weight, task.vae.quant.weight)


def test_twenty_steps_lower_the_loss_and_ship(config: VAEConfig, tmp_path: Path):
    plain = replace(config, mean=(0.0,) * config.latent_channels, std=(1.0,) * config.latent_channels)
    videos = [clip(0, seed, 5) for seed in range(2)]
    task = VaeTask(new_vae(plain, 0), lambda step, seed: torch.cat(videos))
    before = round_trip_psnr(task.vae, videos)
    train(task, TrainConfig(steps=20, lr=5e-3, warmup=3, ema=0.8, log_every=1), tmp_path)
    records = read_log(tmp_path)
    losses = [record["loss"] for record in records]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert {"pixel", "multiscale", "gradient", "kl"} <= records[0].keys()

    averaged = new_vae(plain, 5)
    assert load_ema(tmp_path, {"vae": averaged}) == 20
    done = finished(averaged, videos)
    assert round_trip_psnr(done, videos) > before + 1
    latents = torch.cat([done.encode(video) for video in videos]).transpose(0, 1).flatten(1)  # -> [z, cells]
    torch.testing.assert_close(latents.mean(1), torch.zeros(config.latent_channels), atol=1e-3, rtol=0)
    spread = latents.std(1, correction=0)
    if config.linear:  # one deviation for all
        spread = spread.square().mean().sqrt().expand(config.latent_channels)
    torch.testing.assert_close(spread, torch.ones(config.latent_channels), atol=1e-3, rtol=0)

    ship(done, tmp_path / "vae")
    loaded = load_vae(tmp_path / "vae", dtype=torch.float32)
    assert load_vae(tmp_path / "vae").decoder.conv_in.weight.dtype == torch.bfloat16
    assert loaded.config == done.config
    assert abs(round_trip_psnr(loaded, videos) - round_trip_psnr(done, videos)) < 0.5


def test_autocast_keeps_the_loss_in_fp32(config: VAEConfig):
    task = VaeTask(new_vae(config, 0), clip)
    want = task.loss(0, 1)[0].item()
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = task.loss(0, 1)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(part.dtype == torch.float32 for part in parts.values())
    assert loss.item() == pytest.approx(want, rel=0.05)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in task.vae.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_cuda_trains_in_bf16_and_resumes(config: VAEConfig, tmp_path: Path):
    run = TrainConfig(steps=6, lr=5e-3, device="cuda", bf16=True, log_every=1)
    assert train(VaeTask(new_vae(config, 0), clip), replace(run, minutes=0.0), tmp_path) == 1
    task = VaeTask(new_vae(config, 1), clip)
    assert train(task, run, tmp_path) == 6
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert all(p.is_cuda and p.dtype == torch.float32 for p in task.vae.parameters())
    assert train(VaeTask(new_vae(config, 2), clip), replace(run, steps=7, device="cpu", bf16=False), tmp_path) == 7


def test_statistics_need_latents_that_vary():
    vae = VAE(FORMS["wan21"])
    with torch.no_grad():
        vae.quant.weight.zero_()
    for videos in ([], [clip(0, 0)]):
        with pytest.raises(TrainingError, match=r"got .+, want .+; .+"):
            latent_statistics(vae, videos)
