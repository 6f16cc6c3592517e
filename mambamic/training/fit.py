"""Lightning's loop, with what a run needs around it: states to resume from, logs, clear ends."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    TQDMProgressBar,
)
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import SIGTERMException
from tqdm import tqdm

from mambamic.training.data import Batches, Split
from mambamic.training.module import TrainingModule
from mambamic.training.together import Together

STATE, BEST = "last", "best"  # Lightning adds .ckpt
LOG, CURVES = "log", "tensorboard"
MONITOR, RATE = "val_accuracy", "images_per_second"
_VALIDATION_BATCH = 256


class _Keep(ModelCheckpoint):
    """Keeps a state, and knows it again where the folder of a stopped run was moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        folder = str(self.dirpath)
        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        moved = {name: _moved(state_dict[name], folder) for name in paths}
        scores = {_moved(k, folder): score for k, score in state_dict["best_k_models"].items()}
        super().load_state_dict(
            {**state_dict, **moved, "best_k_models": scores, "dirpath": self.dirpath}
        )


def _moved(path: str, folder: str) -> str:
    return str(Path(folder, Path(path).name)) if path else ""


class WholeFiles(TorchCheckpointIO):
    """Writes a state whole or not at all, also where another file system than /tmp holds it.

    Lightning writes to the folder for temporary files and moves from there, which between file
    systems is a copy: a run that was killed meanwhile could not be resumed.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write beside the file, and then put it in its place."""
        assert storage_options is None
        fresh = Path(path).with_name(f".{Path(path).name}")
        fresh.parent.mkdir(parents=True, exist_ok=True)
        try:
            with fresh.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)


class _Patience(EarlyStopping):
    """Ends a run, also one that was stopped after its end and before its result was written."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.wait_count >= self.patience:
            trainer.should_stop = True


class Progress(Callback):
    """Count what the model card reports: epochs, images and seconds, over all parts of a run."""

    def __init__(self, ranks: int = 1) -> None:
        self.seconds = 0.0
        self.images = self.epochs = 0
        self._ranks = ranks
        self._since, self._before = 0.0, 0

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin to count."""
        self._since, self._before = time.perf_counter(), self.images

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, *args: object
    ) -> None:
        """Count a batch's images, of all processes."""
        batch = args[1]
        assert isinstance(batch, tuple | list)
        self.images += len(batch[0]) * self._ranks

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop counting, when the device has done all, and log the epoch's rate."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took = time.perf_counter() - self._since
        self.seconds += took
        self.epochs += 1
        rate = {RATE: (self.images - self._before) / took, "epoch": trainer.current_epoch}
        for logger in trainer.loggers:
            logger.log_metrics(rate, trainer.global_step)

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed run goes on from."""
        return {"seconds": self.seconds, "images": self.images, "epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on from a stopped run."""
        self.seconds = state_dict["seconds"]
        self.images, self.epochs = int(state_dict["images"]), int(state_dict["epochs"])


class _Bars(TQDMProgressBar):
    """Bars on standard error, as all bars are, that count epochs from 1, as the result does."""

    def init_train_tqdm(self) -> Tqdm:
        with redirect_stdout(sys.stderr):
            return super().init_train_tqdm()

    def init_validation_tqdm(self) -> Tqdm:
        with redirect_stdout(sys.stderr):
            return super().init_validation_tqdm()

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(_epoch(trainer))

    def get_metrics(
        self, trainer: pl.Trainer, module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, module)
        metrics.pop("v_num", None)  # which start of the run this is
        return metrics


class _Lines(Callback):
    """A line per epoch, for the log file of a run that nobody watches."""

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        names = ("train_loss", "val_loss", MONITOR)
        found = {name: float(trainer.callback_metrics[name]) for name in names}
        shown = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        tqdm.write(f"{_epoch(trainer)}: {shown}", file=sys.stderr)


def _epoch(trainer: pl.Trainer) -> str:
    return f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what Lightning says about choices made here on purpose, and its advertisements."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Checkpoint directory .* is not empty", UserWarning)
            warnings.filterwarnings("ignore", "GPU available but not used", UserWarning)
            # Lightning's own use of what torch has renamed.
            warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
            # Said once by torch's thread for backward passes, which makes the context then.
            warnings.filterwarnings("ignore", "Attempting to run cuBLAS", UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let a stopped run end as stopped: Lightning exits by itself, with status 0 after SIGTERM."""
    try:
        yield
    except SIGTERMException as stop:
        raise SystemExit(128 + signal.SIGTERM) from stop
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from stop
        raise


def fit(
    out: Path, module: TrainingModule, clock: Progress, train: Split, val: Split, progress: bool
) -> None:
    """Run the loop in this process's share of a run, keeping the last state and the best epoch's.

    Args:
        out: Where states and logs go.
        module: What is trained.
        clock: Counts.
        train: The images, on the device.
        val: Of the images that choose the epoch.
        progress: Whether to show bars, or a line per epoch where standard error is no terminal.
    """
    recipe, share, device = module.recipe, module.share, train.pixels.device
    several = share.ranks > 1
    batches = Batches(train, recipe.batch_size, recipe.seed, share)
    curves = CSVLogger(out, name=LOG)  # a part for each start
    state = out / f"{STATE}.ckpt"
    shown = progress and share.rank == 0
    with quiet(), _stoppable():
        trainer = pl.Trainer(
            accelerator=device.type.replace("cuda", "gpu"),
            devices=share.ranks,
            strategy=Together(share) if several else "auto",
            plugins=[WholeFiles()],
            use_distributed_sampler=False,  # batches know their share
            precision="bf16-mixed" if train.pixels.is_cuda else "32-true",
            max_epochs=recipe.epochs,
            callbacks=_callbacks(out, clock, recipe.patience, shown),
            logger=[
                curves,
                TensorBoardLogger(out, CURVES, curves.version, default_hp_metric=False),
            ],
            enable_progress_bar=shown and sys.stderr.isatty(),
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=min(20, len(batches)),
        )
        trainer.fit(
            module,
            batches,
            Batches(val, _VALIDATION_BATCH, None, share),
            ckpt_path=state if state.exists() else None,
            weights_only=True,
        )


def _callbacks(out: Path, clock: Progress, patience: int, shown: bool) -> list[Callback]:
    best = _Keep(out, filename=BEST, monitor=MONITOR, mode="max", enable_version_counter=False)
    # A callback of its own: beside a score, Lightning writes the last state after the best only.
    last = _Keep(out, filename=STATE, enable_version_counter=False)
    callbacks: list[Callback] = [best, last, clock]
    if patience:
        callbacks.append(_Patience("val_loss", patience=patience))
    if shown:
        callbacks.append(_Bars(refresh_rate=10) if sys.stderr.isatty() else _Lines())
    return callbacks
