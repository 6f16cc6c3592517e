"""The step that is timed is one that trains."""

from __future__ import annotations

import pytest
import torch

from mambamic.errors import UsageError
from mambamic.training import module, step


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
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


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


def test_the_architecture_is_checked() -> None:
    with pytest.raises(UsageError, match="resnet"):
        step.make_step("resnet", 2, torch.device("cpu"))
