"""The decoder trained on what Stage II makes: which latents it sees, and whose pixels."""

import pytest
import torch
from stage_clips import FRAMES, clips, stage_one
from torch import Tensor

from swifti2v.engine.presets import get_profile
from swifti2v.engine.text import WordEncoder
from swifti2v.engine.vae import VAE
from swifti2v.training.decoder import DecoderConfig, DecoderTask, decoder_samples
from swifti2v.training.flow import encode_clip
from swifti2v.training.stage2 import Stage2Config
from swifti2v.training.vae import reconstruct


@pytest.fixture
def parts(make_modules):
    torch.manual_seed(0)
    tiny = get_profile("tiny").override(size=(128, 64), frames=FRAMES)
    dit = tiny.stage1.dit
    return {**make_modules(tiny), "words": WordEncoder(tiny.text.vocabulary, dit.text_dim, dit.text_len)}


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_a_decoder_learns_from_what_stage_two_makes(parts):
    """The anchor is the image's own block; every other one is made, unless the share of those is none."""
    one, (dit, vae), batch = stage_one(parts), (parts["stage2"], parts["vae2"]), clips(0, 3)
    truth = encode_clip(vae, batch.high)
    made, plain = (decoder_samples(one, dit, vae, batch, DecoderConfig(Stage2Config(), made=n), 7) for n in (1.0, 0.0))
    for i, (latents, pixels) in enumerate(plain):
        assert torch.equal(latents, truth[i : i + 1].half())
        assert torch.equal(pixels, batch.high[i : i + 1].half())
    for i, (latents, _) in enumerate(made):
        assert torch.equal(latents[:, :, 0], truth[i : i + 1, :, 0].half())
        assert all(error(latents[:, :, b].float(), truth[i : i + 1, :, b]) > 1e-3 for b in range(1, latents.shape[2]))
    again = decoder_samples(one, dit, vae, batch, DecoderConfig(Stage2Config(), made=1.0), 7)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(made, again, strict=True)), "a function of the seed"


def test_a_piece_of_latents_has_its_own_pixels(parts):
    """With the whole width as a piece the loss is that of decoding the clip."""
    vae, batch = parts["vae2"], clips(0, 3)
    latents = encode_clip(vae, batch.high)
    samples = list(zip(latents.split(1), batch.high.split(1), strict=True))
    task = DecoderTask(vae, lambda *_: samples, DecoderConfig(Stage2Config(), side=8))
    with torch.no_grad():
        _, terms = task.loss(0, 0)
        pieces = [error_of_pieces(vae, *sample) for sample in samples]
    low, high = min(min(p) for p in pieces), max(max(p) for p in pieces)
    assert low <= terms["pixel"].item() <= high


def error_of_pieces(vae: VAE, latents: Tensor, video: Tensor) -> list[float]:
    """Mean absolute error of every piece of 8 cells, decoded by itself."""
    scale, (height, width) = vae.config.spatial, latents.shape[3:]
    errors = []
    for y in range(max(1, height - 7)):
        for x in range(max(1, width - 7)):
            pixels = reconstruct(vae, latents[..., y : y + 8, x : x + 8] * vae.std + vae.mean)
            truth = video[..., scale * y : scale * (y + 8), scale * x : scale * (x + 8)]
            errors.append((pixels - truth).abs().mean().item())
    return errors
