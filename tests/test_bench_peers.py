"""diffusers' modules beside ours, where ours has what they have not."""

from dataclasses import replace
from typing import Literal

import pytest
import torch

from swifti2v.benchmarks.clock import Timing
from swifti2v.benchmarks.items import Bench, vae_items
from swifti2v.benchmarks.models import open_models
from swifti2v.benchmarks.peak import Peak
from swifti2v.benchmarks.peers import Peer
from swifti2v.benchmarks.rows import measure_items
from swifti2v.benchmarks.variants import eager_variant
from swifti2v.engine.presets import get_profile


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_a_vae_with_linear_maps_has_no_peer(direction: Literal["encode", "decode"]):
    """A network without them would be other work; the other stage's VAE is compared as ever."""
    profile = get_profile("tiny").override(frames=13)
    stage = profile.stage2
    vae = replace(stage.vae, mult=(1, 2, 2), res_blocks=1, temporal=(True, True), linear=True)
    models = open_models(replace(profile, stage2=replace(stage, vae=vae)), None, torch.device("cpu"))
    variant, peer = eager_variant(models, torch.float32), Peer(torch.float32)
    items = vae_items(Bench(models, {variant.name: variant}, [peer]), direction)
    alone, other = (item for item in items if item.name.endswith(" clip"))
    assert peer.name not in alone.works
    (row,), (_, compared) = measure_items([alone, other], models.device, lambda _: Peak(1e9, "any"), Timing(1, 0))
    assert "linear maps" in row.note
    assert not row.ratios
    assert peer.name in compared.ratios
    assert not compared.note
