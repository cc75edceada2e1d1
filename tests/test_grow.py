"""A DiT that goes on with more latent channels: at first it reads and makes its own ones as before."""

from dataclasses import replace

import pytest
import torch
from conftest import randomise

from swifti2v.engine.dit import DiT
from swifti2v.engine.presets import get_profile
from swifti2v.training.grow import grown
from swifti2v.training.log import TrainingError


@torch.no_grad()
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_grown_dit_does_what_it_did(stage: str):
    """New channels get no velocity, and where they are 0 the others get what they got; all can learn."""
    config = getattr(get_profile("tiny"), stage).dit
    z, more = config.out_channels, 3
    dit = DiT(config)
    randomise(dit, 1)
    made = grown(dit, replace(config, in_channels=config.in_channels + 2 * more, out_channels=z + more))
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(2, config.in_channels, 3, 6, 4, generator=draw)
    new = torch.zeros(2, more, 3, 6, 4)
    wide = torch.cat((latents[:, :z], new, latents[:, z:], new), dim=1)
    timesteps, text = torch.tensor([[0.0, 700, 700]] * 2), torch.randn(2, 8, config.text_dim, generator=draw)
    before, after = dit.denoise(latents, timesteps, text), made.denoise(wide, timesteps, text)
    torch.testing.assert_close(after[:, :z], before)
    assert not after[:, z:].any()
    for group in (slice(z, z + more), slice(-more, None)):
        assert made.patch_embedding.weight[:, group].abs().mean() > 0.01


def test_only_channels_may_differ():
    config = get_profile("tiny").stage2.dit
    dit = DiT(config)
    assert grown(dit, config) is dit
    fewer = replace(config, in_channels=config.in_channels - 2, out_channels=config.out_channels - 1)
    for other in (replace(config, layers=config.layers + 1), fewer):
        with pytest.raises(TrainingError, match="DiT to begin with: got DiTConfig"):
            grown(dit, other)
