"""No tensor strays between devices: the whole engine on the meta device, which mixes with no other."""

from dataclasses import replace

import pytest
import torch

from swifti2v.engine.calls import dit_conditions
from swifti2v.engine.dit import DiT
from swifti2v.engine.profile import Profile
from swifti2v.engine.sampler import block_noise, stage_sigmas
from swifti2v.engine.segments import plan_segments
from swifti2v.engine.stage1 import expert_of, image_condition, run_stage1
from swifti2v.engine.stage2 import run_segment, start_state
from swifti2v.engine.text import WordEncoder
from swifti2v.engine.vae import VAE
from swifti2v.runtime.backend_eager import open_eager
from swifti2v.runtime.session import shrink


@pytest.mark.parametrize("context", ["both", "one-way"])
def test_a_clip_stays_on_its_device(tiny: Profile, context: str):
    profile = replace(
        tiny, context=context, stage1=replace(tiny.stage1, boundary=0.9, dit=replace(tiny.stage1.dit, image_dim=12))
    ).override(stage1_guidance=2.0, stage2_guidance=2.0)
    with torch.no_grad():
        device = torch.device("meta")
        dits = {"stage1_high": profile.stage1, "stage1_low": profile.stage1, "stage2": profile.stage2}
        modules = {name: DiT(stage.dit).to(device) for name, stage in dits.items()}
        modules |= {"vae1": VAE(profile.stage1.vae).to(device), "vae2": VAE(profile.stage2.vae).to(device)}
        graphs = open_eager(profile, modules, torch.float32)
        dit = profile.stage1.dit
        words = WordEncoder(profile.text.vocabulary, dit.text_dim, dit.text_len).to(device)
        text = words(torch.zeros(1, dit.text_len, dtype=torch.int64, device=device))
        tokens = torch.zeros(1, dit.image_tokens, dit.image_dim, device=device)
        image = torch.zeros(1, 3, 1, profile.height, profile.width, device=device)

        sigmas = stage_sigmas(profile.stage1)
        experts = [expert_of(profile, sigma) for sigma in sigmas]
        conditions = [dit_conditions(graphs, name, sigmas, text, text, tokens, 2.0) for name in experts]
        small = shrink(image, profile.stage1.height, profile.stage1.width)
        shape = (dit.out_channels, profile.stage1.latent_height, profile.stage1.latent_width)
        noise = block_noise(0, 1, range(profile.blocks), shape).to(device)
        motion = run_stage1(graphs, profile, image_condition(graphs, profile, small), conditions, noise, sigmas)
        assert motion.device.type == "meta"

        state = start_state(graphs, image, motion)
        stage2 = dit_conditions(graphs, "stage2", sigmas, text, text, guidance=2.0)
        (first, second, *_) = plan_segments(profile.blocks)
        for segment in (first, second):
            pixels, state = run_segment(graphs, profile, segment, state, stage2, motion, 0, sigmas)
            assert pixels.device.type == "meta"
        assert all(cache.device.type == "meta" for cache in state.decoder_cache)
