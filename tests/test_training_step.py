"""The step that is timed is one that trains."""

from __future__ import annotations

import pytest
import torch

from mambamic.errors import UsageError
from mambamic.models import create_model
from mambamic.training import module, step
from mambamic.training.augment import Augmentation
from mambamic.training.recipe import Recipe

from . import gpu_waits

# Said once, by torch's thread for backward passes, which makes the context then.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")


def test_steps_train() -> None:
    torch.manual_seed(0)
    work = step.make_step("mambamic_t", 8, torch.device("cpu"), torch.float32, size=32)
    losses = [float(work()) for _ in range(12)]
    assert sum(losses[-3:]) < 0.93 * sum(losses[:3])


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["mambamic_t", "medmamba_t"])
def test_a_step_does_not_wait_for_the_gpu(arch: str) -> None:
    work = step.make_step(arch, 2, torch.device("cuda"))
    work()
    work()
    with gpu_waits.refused():
        work()


@pytest.mark.gpu
def test_what_is_replayed_is_what_would_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on weights, running statistics and random numbers would differ."""
    losses = []
    for replayed in (False, True):
        if not replayed:
            monkeypatch.setattr(module, "capture", lambda *_: None)
        torch.manual_seed(0)
        work = step.make_step("mambamic_t", 32, torch.device("cuda"))
        torch.manual_seed(1)
        losses.append([float(work()) for _ in range(3)])
        monkeypatch.undo()
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.gpu
def test_images_of_another_size_are_captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small images, full ones, and small ones again, with a step of the optimiser after each."""
    device = torch.device("cuda")
    every = torch.randint(0, 256, (32, 224, 224, 3), dtype=torch.uint8, device=device)
    labels = torch.randint(0, 8, (32,), device=device)
    losses = []
    for replayed in (False, True):
        torch.manual_seed(0)
        model = create_model("mambamic_t", 8)
        augmentation = Augmentation((0.5,) * 3, (0.5,) * 3)
        trained = module.TrainingModule(model, augmentation, Recipe(batch_size=32)).to(device)
        trained.replayed = replayed
        optimizer = trained.optimizer()
        torch.manual_seed(1)
        found = []
        for side in (160, 160, 224, 224, 160):
            monkeypatch.setattr(Recipe, "side", lambda *_, side=side: side)
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = trained.loss(every, labels)
            loss.backward()
            trained.clip()
            optimizer.step()
            found.append(float(loss.detach()))
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_the_architecture_is_checked() -> None:
    with pytest.raises(UsageError, match="resnet"):
        step.make_step("resnet", 2, torch.device("cpu"))
