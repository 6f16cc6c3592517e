"""Several processes that train together: the same result as one, and no way to hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, distributed, nn

from mambamic.errors import DataError, TrainingError
from mambamic.training.augment import Augmentation
from mambamic.training.data import Split
from mambamic.training.fit import Progress, fit
from mambamic.training.module import TrainingModule
from mambamic.training.ranks import run_ranks
from mambamic.training.recipe import Recipe
from mambamic.training.share import Share

from .rank_work import average, fail

RECIPE = Recipe(epochs=3, warmup_epochs=1, batch_size=4, learning_rate=0.1, ema_decay=0.5)


def saved(path: Path) -> list[Tensor]:
    tensors: list[Tensor] = torch.load(path, weights_only=True)
    return tensors


def test_averages_are_the_same_everywhere(tmp_path: Path) -> None:
    run_ranks(partial(average, tmp_path), 2, "cpu")
    before = [saved(tmp_path / f"before_{rank}.pt") for rank in range(2)]
    for rank in range(2):
        for mean, *parts in zip(saved(tmp_path / f"after_{rank}.pt"), *before, strict=True):
            torch.testing.assert_close(mean, (parts[0] + parts[1]) / 2)


def images() -> Split:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (18, 4, 4, 3), dtype=torch.uint8, generator=generator)
    pixels[1::2] //= 4
    return Split(pixels, torch.arange(18) % 2, ("bright", "dark"))


def train_linear(out: Path, share: Share, clock: Progress | None = None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    augmentation = Augmentation((0.5,) * 3, (0.5,) * 3, share=share)
    module = TrainingModule(model, augmentation, RECIPE, torch.tensor([0.5, 1.5]))
    # An odd number to validate: the shares differ in size.
    val = Split(images().pixels[:13], images().labels[:13], images().classes)
    fit(out, module, clock or Progress(share.ranks), images(), val, progress=False)
    torch.save(dict(module.state_dict()), out / f"rank_{share.rank}.pt")


def test_several_devices_do_what_one_does(tmp_path: Path) -> None:
    """The same images in the same batches, augmented alike: only sums are rounded differently."""
    (tmp_path / "one").mkdir()
    train_linear(tmp_path / "one", Share())
    (tmp_path / "two").mkdir()
    run_ranks(partial(train_linear, tmp_path / "two"), 2, "cpu")
    one = torch.load(tmp_path / "one/rank_0.pt", weights_only=True)
    two = [torch.load(tmp_path / f"two/rank_{rank}.pt", weights_only=True) for rank in range(2)]
    assert one["average.n_averaged"] == 3 * (18 // 4)
    for key in one:
        assert torch.equal(two[0][key], two[1][key]), key
        torch.testing.assert_close(two[0][key], one[key], msg=key)
    scores = [read_scores(tmp_path / name) for name in ("one", "two")]
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)
    assert sorted(path.name for path in (tmp_path / "two/log").iterdir()) == ["version_0"]


def count_broadcasts(out: Path, share: Share) -> None:
    (out / f"{share.rank}").mkdir()
    with patch.object(distributed, "broadcast", wraps=distributed.broadcast) as broadcast:
        train_linear(out / f"{share.rank}", share)
    (out / f"broadcasts_{share.rank}").write_text(str(broadcast.call_count))


def test_no_step_waits_to_hear_whether_another_process_stops(tmp_path: Path) -> None:
    """It would hold up the host, and thereby each device."""
    run_ranks(partial(count_broadcasts, tmp_path), 2, "cpu")
    steps = 3 * (18 // 4)
    assert all(int((tmp_path / f"broadcasts_{rank}").read_text()) < steps for rank in range(2))


class _Stopped(Progress):
    """Is told to stop in the second epoch, alone."""

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        super().on_train_epoch_start(trainer, module)
        if trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def train_and_stop_one(out: Path, share: Share) -> None:
    train_linear(out, share, (_Stopped if share.rank else Progress)(share.ranks))


def test_one_that_is_told_to_stop_ends_all(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="ended with status -15"):
        run_ranks(partial(train_and_stop_one, tmp_path), 2, "cpu")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["epoch"] == 0


def read_scores(out: Path) -> list[float]:
    state = torch.load(out / "best.ckpt", weights_only=True)
    best = next(s for s in state["callbacks"].values() if s.get("monitor") == "val_accuracy")
    return [float(best["best_model_score"]), float(state["callbacks"]["Progress"]["images"])]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("told", DataError, "^no images; expected some; add them$"),
        ("surprise", TrainingError, "ValueError: surprise"),
        ("killed", TrainingError, "ended with status -9"),
    ],
)
def test_where_one_fails_none_waits(
    how: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run_ranks(partial(fail, how, tmp_path), 2, "cpu")
    assert not [p for p in tmp_path.iterdir() if psutil.pid_exists(int(p.name))]


@pytest.mark.parametrize(
    ("how", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_nothing_is_left_behind(how: signal.Signals, status: int, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from tests.rank_work import start_idle\n"
        f"if __name__ == '__main__': start_idle(Path({str(tmp_path)!r}))"
    )
    root = Path(__file__).resolve().parent.parent
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 2:
        assert parent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = [int(path.name) for path in tmp_path.iterdir()]
    parent.send_signal(how)
    assert parent.wait(60) == status
    while any(psutil.pid_exists(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
