"""One training run, from a folder of images to a checkpoint, resumable after any stop."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger

from mambamic._version import __version__
from mambamic.checkpoint import Checkpoint, save_checkpoint
from mambamic.config import Config
from mambamic.errors import BackendError, DataError, UsageError
from mambamic.kernels import resolve
from mambamic.models import create_model
from mambamic.preprocess import Preprocess
from mambamic.training.augment import Augmentation
from mambamic.training.card import model_card
from mambamic.training.data import Batches, Split, load_split
from mambamic.training.module import TrainingModule
from mambamic.training.recipe import Recipe

RUN_FILE = "run.json"
STATE = "last"  # Lightning adds .ckpt
RESULT = "checkpoint"
_VALIDATION_BATCH = 256


@dataclass(frozen=True)
class Run:
    """What is trained on what.

    Args:
        data: A folder with ``train`` and ``val``, as folders or zips.
        architecture: One of ``models.VARIANTS``.
        out: Where the state, the log and at the end ``checkpoint/`` go.
        recipe: The settings.
        preprocess: How images are brought to the model's size.
        mpp: Microns per pixel of the tiles, None where unknown.
        licence: Of the weights.
        training_data: What the images are, for the model card.
    """

    data: Path
    architecture: str
    out: Path
    recipe: Recipe
    preprocess: Preprocess
    mpp: float | None = None
    licence: str = "unknown"
    training_data: str = "unknown"

    def identity(self) -> dict[str, object]:
        """Return what must be equal for a stopped run to be resumed."""
        return {
            "architecture": self.architecture,
            "recipe": self.recipe.as_dict(),
            "input_size": self.preprocess.input_size,
            "resize": self.preprocess.resize,
            "mambamic": __version__,
        }


class _Progress(Callback):
    """Count what the model card reports: training seconds over all parts of a run."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.images = 0
        self._since = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, *args: object
    ) -> None:
        batch = args[1]
        assert isinstance(batch, tuple | list)
        self.images += len(batch[0])

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._since

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds, "images": self.images}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.seconds, self.images = state_dict["seconds"], int(state_dict["images"])


def train(run: Run, *, device: str = "auto", progress: bool = True) -> Checkpoint:
    """Train, or go on where a stopped run in the same folder left off.

    Args:
        run: What to do.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: Whether to show progress bars.

    Returns:
        The checkpoint with the best validation accuracy, at ``run.out / "checkpoint"``.

    Raises:
        UsageError: ``run.out`` holds a run with other settings.
        DataError: The images cannot be used.
        BackendError: The device or its scan kernel is not available.
    """
    target = _device(device)
    resolve("auto", target)
    run.out.mkdir(parents=True, exist_ok=True)
    _claim(run)
    pl.seed_everything(run.recipe.seed, verbose=False)
    train_split = load_split(run.data, "train", run.preprocess, progress=progress)
    val_split = load_split(run.data, "val", run.preprocess, progress=progress)
    if train_split.classes != val_split.classes:
        raise DataError(
            f"classes {train_split.classes} in train and {val_split.classes} in val",
            "the same classes in both",
            "add what is missing, or remove it",
        )
    model = create_model(run.architecture, len(train_split.classes))
    augmentation = Augmentation(run.preprocess.mean, run.preprocess.std)
    module = TrainingModule(model, augmentation, run.recipe)
    clock = _Progress()
    best = _fit(run, module, clock, train_split.to(target), val_split.to(target), progress)
    return _export(run, best, clock, train_split, val_split, target)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r}", "auto, cpu or cuda", "choose one of these")
    if name == "cuda" and not torch.cuda.is_available():
        raise BackendError("device 'cuda' is not here", "an NVIDIA GPU", "use --device cpu")
    return torch.device(name)


def _claim(run: Run) -> None:
    path = run.out / RUN_FILE
    identity = json.loads(json.dumps(run.identity()))
    if path.exists():
        found = json.loads(path.read_text())
        if found != identity:
            different = sorted(k for k in identity if found.get(k) != identity[k])
            raise UsageError(
                f"{run.out} holds a run with another {', '.join(different)}",
                "the settings it was begun with, to resume it",
                "repeat these, or give another --out",
            )
    else:
        path.write_text(json.dumps(identity, indent=2) + "\n")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Lightning says about choices made here on purpose."""
    with warnings.catch_warnings():
        for message in (".*does not have many workers.*", ".*exists and is not empty.*",
                        ".*smaller than the logging interval.*", ".*LeafSpec.*",
                        ".*`weights_only`.*"):  # fmt: skip
            warnings.filterwarnings("ignore", message=message)
        yield


def _fit(
    run: Run, module: TrainingModule, clock: _Progress, train: Split, val: Split, progress: bool
) -> Path:
    """Run the loop and return the file of the best epoch's state."""
    keep = ModelCheckpoint(
        run.out,
        filename="best",
        monitor="val_accuracy",
        mode="max",
        save_last=True,
        enable_version_counter=False,
    )
    callbacks: list[Callback] = [keep, clock]
    if progress:
        callbacks.append(TQDMProgressBar(refresh_rate=10))
    state = run.out / f"{STATE}.ckpt"
    with _quiet():
        trainer = pl.Trainer(
            accelerator=train.pixels.device.type.replace("cuda", "gpu"),
            devices=1,
            precision="bf16-mixed" if train.pixels.is_cuda else "32-true",
            max_epochs=run.recipe.epochs,
            gradient_clip_val=run.recipe.clip_norm,
            callbacks=callbacks,
            logger=CSVLogger(run.out, name="", version="log"),
            enable_progress_bar=progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=20,
        )
        trainer.fit(
            module,
            Batches(train, run.recipe.batch_size, run.recipe.seed),
            Batches(val, _VALIDATION_BATCH, None),
            ckpt_path=state if state.exists() else None,
            weights_only=False,  # a file that this very run wrote: optimiser and loop state
        )
    return Path(keep.best_model_path)


def _export(
    run: Run, best: Path, clock: _Progress, train: Split, val: Split, device: torch.device
) -> Checkpoint:
    saved = torch.load(best, map_location="cpu", weights_only=False)
    prefix = "average.module."
    weights = {
        key.removeprefix(prefix): tensor
        for key, tensor in saved["state_dict"].items()
        if key.startswith(prefix)
    }
    scores = next(
        state for key, state in saved["callbacks"].items() if key.startswith("ModelCheckpoint")
    )
    metrics = {
        "val_accuracy": round(float(scores["best_model_score"]), 5),
        "val_images": len(val),
        "train_images": len(train),
        "best_epoch": int(saved["epoch"]) + 1,
        "epochs": run.recipe.epochs,
        "minutes": round(clock.seconds / 60, 1),
        "images_per_second": round(clock.images / max(clock.seconds, 1e-9)),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "seed": run.recipe.seed,
        "torch": torch.__version__,
    }
    config = Config(
        architecture=run.architecture,
        classes=train.classes,
        input_size=run.preprocess.input_size,
        resize=run.preprocess.resize,
        interpolation=run.preprocess.interpolation,
        mean=run.preprocess.mean,
        std=run.preprocess.std,
        mpp=run.mpp,
        licence=run.licence,
        training_data=run.training_data,
        metrics=metrics,
    )
    return save_checkpoint(
        run.out / RESULT, config, weights, model_card(config, run.recipe), half=True
    )
