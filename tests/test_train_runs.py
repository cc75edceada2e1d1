"""Runs of both stages' tasks on tiny models: they learn, and one in parts is the one that nothing interrupted."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from stage_clips import FRAMES, stage1_task, stage2_task, stage_one, stage_parts
from torch import Tensor

from swifti2v.engine.presets import get_profile
from swifti2v.engine.profile import Profile
from swifti2v.training.log import Record
from swifti2v.training.stage1 import Stage1Task
from swifti2v.training.stage2 import Stage2Task
from swifti2v.training.trainer import TrainConfig, train


@pytest.fixture
def tiny() -> Profile:
    return get_profile("tiny").override(size=(128, 64), frames=FRAMES)


@pytest.fixture(params=["stage1", "stage2"])
def make_task(request: pytest.FixtureRequest, tiny: Profile, make_modules):
    """Makes the task of a stage anew, the same each time."""

    def make() -> Stage1Task | Stage2Task:
        parts = stage_parts(tiny, make_modules(tiny))
        return stage1_task(stage_one(parts)) if request.param == "stage1" else stage2_task(parts)

    return make


def test_20_steps_lower_the_loss(make_task, tmp_path: Path):
    """Of samples and noise that are the same before and after."""
    task = make_task()

    def losses() -> float:
        with torch.no_grad():
            return sum(float(task.loss(step, step)[0]) for step in range(4))

    before = losses()
    train(task, TrainConfig(20, lr=3e-3, warmup=2, curve=False), tmp_path)
    assert losses() < 0.97 * before


def test_a_run_in_two_parts_is_the_run_in_one(make_task, tmp_path: Path):
    """Bit by bit, with samples that transition makes."""
    config = TrainConfig(4, lr=3e-3, warmup=1, save_every=2, log_every=1, curve=False)

    def interrupt(record: Record) -> None:
        if record["step"] == 3:
            raise InterruptedError

    def weights(folder: Path, stop: bool) -> list[Tensor]:
        task = make_task()
        with suppress(InterruptedError):
            train(task, config, folder, interrupt if stop else None)
        return [value for module in task.modules.values() for value in module.state_dict().values()]

    whole = weights(tmp_path / "whole", stop=False)
    weights(tmp_path / "parts", stop=True)
    assert not all(torch.equal(a, b) for a, b in zip(whole, weights(tmp_path / "none", stop=True), strict=True))
    for a, b in zip(whole, weights(tmp_path / "parts", stop=False), strict=True):
        assert torch.equal(a, b)
