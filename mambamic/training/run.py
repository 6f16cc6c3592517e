"""One training run, from a folder of images to a checkpoint, resumable after any stop."""

from __future__ import annotations

import json
import logging
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import SIGTERMException

from mambamic._version import __version__
from mambamic.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
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
STATE, BEST = "last", "best"  # Lightning adds .ckpt
LOG = "log"
RESULT = "checkpoint"
_MONITOR = "val_accuracy"
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
            **self.recipe.as_dict(),
            **asdict(self.preprocess),
            "mambamic": __version__,
        }

    def config(
        self, classes: tuple[str, ...], metrics: dict[str, Any], *, multi_label: bool = False
    ) -> Config:
        """Return what the checkpoint will state.

        Raises:
            UsageError: A setting that no checkpoint can have.
        """
        return Config.from_settings(
            architecture=self.architecture,
            classes=classes,
            head="sigmoid" if multi_label else "softmax",
            mpp=self.mpp,
            licence=self.licence,
            training_data=self.training_data,
            metrics=metrics,
            **asdict(self.preprocess),
        )


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

    A run that is finished is not repeated: what it may be told anew is what the model card says
    of the images and the licence.

    Args:
        run: What to do.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: Whether to show progress bars.

    Returns:
        The checkpoint with the best validation accuracy, at ``run.out / "checkpoint"``.

    Raises:
        UsageError: ``run.out`` holds a run with other settings, or a setting makes no sense.
        DataError: The images cannot be used.
        BackendError: The device or its scan kernel is not available.
        KeyboardInterrupt: Ctrl-C; the finished epochs are kept.
        SystemExit: SIGTERM; the finished epochs are kept.
    """
    target = _device(device)
    resolve("auto", target)
    # Now, and not when the training is over.
    run.config(("a class",), {})
    identity = run.identity()
    _compare(run.out, identity)
    if (run.out / RESULT).exists():
        return _describe_anew(run, load_checkpoint(run.out / RESULT))
    train_split = load_split(run.data, "train", run.preprocess, progress=progress)
    val_split = load_split(run.data, "val", run.preprocess, progress=progress)
    _compare_classes(train_split, val_split)
    identity |= {
        "classes": train_split.classes,
        "train_images": len(train_split),
        "val_images": len(val_split),
    }
    _compare(run.out, identity)
    _claim(run.out, identity)
    torch.manual_seed(run.recipe.seed)
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


def _compare_classes(train: Split, val: Split) -> None:
    for split, others, name, other in ((train, val, "train", "val"), (val, train, "val", "train")):
        missing = [label for label in split.classes if label not in others.classes]
        if missing:
            raise DataError(
                f"{name} has classes that {other} has not: {', '.join(missing)}",
                "the same classes in both",
                "add what is missing, or remove it",
            )


def _compare(out: Path, identity: dict[str, Any]) -> None:
    """Refuse to go on with a run that was begun with something else."""
    path = out / RUN_FILE
    if not path.exists():
        if (out / RESULT).exists():
            raise UsageError(
                f"{out / RESULT} is not from a run in {out}", "a new folder", "give another --out"
            )
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(identity))
    different = [
        f"{name} {found.get(name)!r} and not {wanted[name]!r}"
        for name in wanted
        if found.get(name) != wanted[name]
    ]
    if different:
        raise UsageError(
            f"{out} holds a run with {', '.join(different)}",
            "the settings and images it was begun with, to resume it",
            "repeat these, or give another --out",
        )


def _claim(out: Path, identity: dict[str, Any]) -> None:
    fresh = out / f".{RUN_FILE}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        fresh.replace(out / RUN_FILE)
    except OSError as error:
        raise UsageError(
            f"{out} cannot be written ({error.strerror})", "a folder", "give another --out"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
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


def _fit(
    run: Run, module: TrainingModule, clock: _Progress, train: Split, val: Split, progress: bool
) -> Path:
    """Run the loop and return the file of the best epoch's state."""
    keep = _Keep(run.out, filename=BEST, monitor=_MONITOR, mode="max", enable_version_counter=False)
    # A callback of its own: beside a score, Lightning writes the last state after the best only.
    last = _Keep(run.out, filename=STATE, enable_version_counter=False)
    callbacks: list[Callback] = [keep, last, clock]
    if progress:
        callbacks.append(TQDMProgressBar(refresh_rate=10))
    batches = Batches(train, run.recipe.batch_size, run.recipe.seed)
    state = run.out / f"{STATE}.ckpt"
    with _quiet(), _stoppable():
        trainer = pl.Trainer(
            accelerator=train.pixels.device.type.replace("cuda", "gpu"),
            devices=1,
            precision="bf16-mixed" if train.pixels.is_cuda else "32-true",
            max_epochs=run.recipe.epochs,
            gradient_clip_val=run.recipe.clip_norm,
            callbacks=callbacks,
            logger=CSVLogger(run.out, name=LOG),  # a part for each start
            enable_progress_bar=progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=min(20, len(batches)),
        )
        trainer.fit(
            module,
            batches,
            Batches(val, _VALIDATION_BATCH, None),
            ckpt_path=state if state.exists() else None,
            weights_only=True,
        )
    return run.out / f"{BEST}.ckpt"


def _export(
    run: Run, best: Path, clock: _Progress, train: Split, val: Split, device: torch.device
) -> Checkpoint:
    saved = torch.load(best, map_location="cpu", weights_only=True)
    prefix = "average.module."
    weights = {
        key.removeprefix(prefix): tensor
        for key, tensor in saved["state_dict"].items()
        if key.startswith(prefix)
    }
    scores = next(
        state for state in saved["callbacks"].values() if state.get("monitor") == _MONITOR
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
    config = run.config(train.classes, metrics, multi_label=train.multi_label)
    return save_checkpoint(
        run.out / RESULT, config, weights, model_card(config, run.recipe), half=True
    )


def _describe_anew(run: Run, checkpoint: Checkpoint) -> Checkpoint:
    """Bring what the user states, and training does not change, up to date."""
    config = replace(
        checkpoint.config, mpp=run.mpp, licence=run.licence, training_data=run.training_data
    )
    if config == checkpoint.config:
        return checkpoint
    card = model_card(config, run.recipe)
    return save_checkpoint(checkpoint.path, config, checkpoint.state_dict(), card, half=True)
