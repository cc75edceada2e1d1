"""What reaches the models, tensor by tensor: channels, blocks, rows, positions and prompts of every step.

The models are real; each executable is wrapped so that its feeds can be looked at afterwards.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from swifti2v import Profile, Request, plan_segments
from swifti2v.engine.rope import rope_tables
from swifti2v.engine.sampler import block_noise
from swifti2v.engine.spec import Executable, GraphSpec
from swifti2v.engine.state import SegmentState
from swifti2v.runtime.session import Session


class Recorded:
    """An executable that keeps a copy of every feed, and hands out what the real one makes."""

    def __init__(self, real: Executable, kept: list[tuple[str, dict[str, Tensor], dict[str, Tensor]]]) -> None:
        self.spec: GraphSpec = real.spec
        self._real, self._kept = real, kept

    def __call__(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        before = {name: tensor.clone() for name, tensor in feed.items()}
        made = self._real(feed)
        self._kept.append((self.spec.name, before, {name: tensor.clone() for name, tensor in made.items()}))
        return made

    def close(self) -> None:
        self._real.close()


class Run:
    """One clip with everything that its models were fed."""

    def __init__(self, session: Session, seed: int = 5) -> None:
        self.profile = profile = session.profile
        self.calls: list[tuple[str, dict[str, Tensor], dict[str, Tensor]]] = []
        session.graphs = {name: Recorded(graph, self.calls) for name, graph in session.graphs.items()}
        image = np.random.default_rng(1).integers(0, 256, (profile.height, profile.width, 3), np.uint8)
        request = Request(image, "pan left", seed=seed)
        self.states: list[SegmentState] = []
        self.clip, start = session.prepare(request)
        self.anchor = start.anchor.clone()
        list(session.resume(request, self.clip, start, on_state=lambda state: self.states.append(state.clone())))

    def feeds(self, *names: str) -> list[dict[str, Tensor]]:
        return [feed for name, feed, _ in self.calls if name in names]

    def made(self, name: str) -> list[dict[str, Tensor]]:
        return [made for called, _, made in self.calls if called == name]


def test_stage_one_reads_noise_then_mask_then_image(tiny: Profile, make_session):
    run = Run(make_session(tiny))
    z, stage = tiny.stage1.vae.latent_channels, tiny.stage1
    feeds = run.feeds("stage1_step")
    assert len(feeds) == 4
    noise = block_noise(5, 1, range(tiny.blocks), (z, stage.latent_height, stage.latent_width))
    assert torch.equal(feeds[0]["latents"][:, :z], noise)
    encoded = torch.cat([made["latents"] for name in ("image_first", "image_next") for made in run.made(name)], dim=2)
    for feed in feeds:
        assert (feed["latents"][:, z : z + 4, 0] == 1).all()
        assert (feed["latents"][:, z : z + 4, 1:] == 0).all()
        assert torch.equal(feed["latents"][:, z + 4 :], encoded)
        assert (feed["rows"] == 1).all()
    images = run.feeds("image_first", "image_next")
    assert len(images) == tiny.blocks
    assert all((feed["pixels"] == 0).all() for feed in images[1:]), "mid-grey after the image"


def test_each_step_of_stage_one_has_its_own_timestep(tiny: Profile, make_session):
    run = Run(make_session(tiny))
    timesteps = [feed["timesteps"].tolist() for feed in run.feeds("stage1_time")]
    assert timesteps == [[0, pytest.approx(t)] for t in (1000, 937.5, 833.3333, 625)]
    for feed, made in zip(run.feeds("stage1_step"), run.made("stage1_time"), strict=True):
        assert torch.equal(feed["modulation"], made["modulation"])
        assert torch.equal(feed["head_modulation"], made["head_modulation"])


def test_two_experts_each_read_their_own_tables_and_prompt(tiny: Profile, make_session):
    run = Run(make_session(replace(tiny, stage1=replace(tiny.stage1, boundary=0.9))))
    order = [name for name, _, _ in run.calls if name.startswith("stage1_") and name.endswith("_step")]
    assert order == ["stage1_high_step"] * 2 + ["stage1_low_step"] * 2
    for expert, steps in (("high", (0, 1)), ("low", (2, 3))):
        (text,) = run.made(f"stage1_{expert}_text")
        tables = run.made(f"stage1_{expert}_time")
        for feed, step in zip(run.feeds(f"stage1_{expert}_step"), steps, strict=True):
            assert torch.equal(feed["text_k"], text["text_k"])
            assert torch.equal(feed["text_v"], text["text_v"])
            assert torch.equal(feed["modulation"], tables[step]["modulation"])
    high, low = run.made("stage1_high_text")[0], run.made("stage1_low_text")[0]
    assert not torch.equal(high["text_k"], low["text_k"])


def test_a_first_block_model_reads_the_image_as_its_clean_first_block(tiny: Profile, make_session):
    run = Run(make_session(replace(tiny, stage1=replace(tiny.stage1, dit=replace(tiny.stage1.dit, in_channels=4)))))
    (image,) = run.made("image_first")
    for feed in run.feeds("stage1_step"):
        assert torch.equal(feed["latents"][:, :, :1], image["latents"])
        assert feed["rows"].tolist() == [[0] + [1] * (tiny.blocks - 1)]


def test_the_reference_is_aligned_with_the_motion(tiny: Profile, make_session):
    """Block k of the reference is made of block k of the motion, and block 0 of the image."""
    run = Run(make_session(tiny))
    motion = [feed["latents"] for feed in run.feeds("motion_first", "motion_next")]
    assert len(motion) == tiny.blocks
    assert all(torch.equal(block, run.clip.motion[:, :, k : k + 1]) for k, block in enumerate(motion))
    order = [name for name, _, _ in run.calls if name in ("motion_next", "reference_next")]
    assert order == ["motion_next", "reference_next"] * (tiny.blocks - 1)


@pytest.mark.parametrize(("noisy", "neighbours"), [(3, 1), (3, 2), (2, 0)])
def test_windows_hold_what_the_plan_says(tiny: Profile, make_session, noisy: int, neighbours: int):
    profile = tiny.override(noisy=noisy, neighbours=neighbours)
    run = Run(make_session(profile))
    z, stage = profile.stage2.vae.latent_channels, profile.stage2
    reference = [made["latents"] for name in ("reference_first", "reference_next") for made in run.made(name)]
    final = {0: run.anchor}
    for segment, state in zip(plan_segments(profile.blocks, noisy, neighbours), run.states, strict=True):
        made = state.latents[:, :, -len(segment.noisy) :]
        final |= {block: made[:, :, i : i + 1] for i, block in enumerate(segment.noisy)}
    feeds = run.feeds("stage2_first", "stage2_next")
    assert torch.equal(run.anchor, reference[0])
    for segment in plan_segments(profile.blocks, noisy, neighbours):
        steps = [feeds.pop(0) for _ in range(4)]
        shape = (z, stage.latent_height, stage.latent_width)
        assert torch.equal(steps[0]["latents"][:, :z, segment.clean :], block_noise(5, 2, segment.noisy, shape))
        cos, sin = rope_tables(stage.dit.head_dim, segment.window, stage.latent_height // 2, stage.latent_width // 2)
        for feed in steps:
            latents = feed["latents"]
            assert torch.equal(latents[:, z:], torch.cat([reference[block] for block in segment.window], dim=2))
            clean = torch.cat([final[block] for block in (0, *segment.context)], dim=2)
            assert torch.equal(latents[:, :z, : segment.clean], clean)
            assert feed["rows"].tolist() == [[0] * segment.clean + [1] * len(segment.noisy)]
            assert torch.equal(feed["cos"], cos)
            assert torch.equal(feed["sin"], sin)
    assert not feeds


def test_window_positions_count_from_zero(tiny: Profile, make_session):
    run = Run(make_session(replace(tiny, positions="window")))
    stage = tiny.stage2
    cos, _ = rope_tables(stage.dit.head_dim, range(5), stage.latent_height // 2, stage.latent_width // 2)
    assert all(torch.equal(feed["cos"], cos) for feed in run.feeds("stage2_next"))


def test_guidance_runs_every_step_twice_in_its_stage_only(tiny: Profile, make_session):
    run = Run(make_session(tiny.override(stage1_guidance=2.0)))
    assert len(run.feeds("stage1_step")) == 8
    assert len(run.feeds("stage2_first", "stage2_next")) == 12
    positive, negative = run.made("stage1_text")
    for index, feed in enumerate(run.feeds("stage1_step")):
        assert torch.equal(feed["text_k"], (negative if index % 2 else positive)["text_k"])
    assert len(run.made("stage2_text")) == 1


def test_decoding_gets_every_final_block_once_in_order(tiny: Profile, make_session):
    run = Run(make_session(tiny))
    blocks = [feed["latents"] for feed in run.feeds("decode_first", "decode_next")]
    made = [run.anchor]
    for segment, state in zip(plan_segments(tiny.blocks), run.states, strict=True):
        made += state.latents[:, :, -len(segment.noisy) :].split(1, dim=2)
    assert len(blocks) == tiny.blocks
    assert all(torch.equal(one, other) for one, other in zip(blocks, made, strict=True))
