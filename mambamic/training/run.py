"""One training run, from a folder of images to a checkpoint, resumable after any stop."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from mambamic._version import __version__
from mambamic.checkpoint import Checkpoint, load_checkpoint
from mambamic.config import Config
from mambamic.errors import BackendError, DataError, TrainingError, UsageError
from mambamic.kernels import resolve
from mambamic.models import create_model
from mambamic.preprocess import Preprocess
from mambamic.training.augment import Augmentation
from mambamic.training.card import restate
from mambamic.training.data import Split, load_split
from mambamic.training.fit import BEST, STATE, Progress, fit
from mambamic.training.initial import check_initial, head_of, start_from
from mambamic.training.loss import class_weights
from mambamic.training.module import TrainingModule
from mambamic.training.ranks import run_ranks
from mambamic.training.recipe import Recipe
from mambamic.training.result import RUN_FILE, name_of, open_state, with_best, write_result
from mambamic.training.share import Share
from mambamic.training.teachers import Teachers

RESULT = "checkpoint"
# What torch says, in a plain RuntimeError, of memory that it does not get on a CPU, or on a GPU
# outside its own allocator.
_NO_MEMORY = (
    *("can't allocate memory", "Cannot allocate memory", "not enough memory", "out of memory"),
    *("std::bad_alloc", "can't start new thread"),
)
# oneDNN keeps the reason to itself. What it cannot do at all it says before, of a descriptor.
_ONEDNN_NO_MEMORY = (
    *("could not create a primitive", "could not execute a primitive"),
    "could not create a memory object",
)


@dataclass(frozen=True)
class Run:
    """What is trained on what.

    Args:
        data: A folder with ``train`` and ``val``, as folders or zips.
        architecture: One of ``models.VARIANTS``.
        out: Where the state, the log and at the end ``checkpoint/`` go.
        recipe: The settings.
        preprocess: How images are brought to the model's size.
        mpp: Microns per pixel of the tiles; None, here and below, where it is not said.
        licence: Of the weights.
        training_data: What the images are, for the model card.
        init: A checkpoint to start from, of the same architecture.
        teachers: Checkpoints to learn from beside the labels, of the same classes.
        classes: Names in the order that the labels shall have; None for that of ``load_split``.
    """

    data: Path
    architecture: str
    out: Path
    recipe: Recipe
    preprocess: Preprocess
    mpp: float | None = None
    licence: str | None = None
    training_data: str | None = None
    init: Path | None = None
    teachers: tuple[Path, ...] = ()
    classes: tuple[str, ...] | None = None

    def identity(self) -> dict[str, object]:
        """Return what must be equal for a stopped run to be resumed."""
        return {
            "architecture": self.architecture,
            **self.recipe.as_dict(),
            **asdict(self.preprocess),
            "init": self.initial().config.weights_sha256 if self.init else None,
            "teachers": [teacher.config.weights_sha256 for teacher in self.taught_by()],
            "mambamic": __version__,
        }

    def initial(self) -> Checkpoint:
        """Open the checkpoint to start from."""
        assert self.init is not None
        return load_checkpoint(self.init)

    def taught_by(self) -> tuple[Checkpoint, ...]:
        """Open the checkpoints to learn from."""
        return tuple(map(load_checkpoint, self.teachers))

    def config(
        self, classes: tuple[str, ...], metrics: dict[str, Any], head: str = "softmax"
    ) -> Config:
        """Return what the checkpoint will state.

        Raises:
            UsageError: A setting that no checkpoint can have.
        """
        return Config.from_settings(
            architecture=self.architecture,
            classes=classes,
            head=head,
            metrics=metrics,
            **asdict(self.preprocess),
            **self.said(),
        )

    def said(self) -> dict[str, Any]:
        """Return what the user says of the images and the weights, which training cannot find."""
        said = {"mpp": self.mpp, "licence": self.licence, "training_data": self.training_data}
        return {name: value for name, value in said.items() if value is not None}


def train(run: Run, *, device: str = "auto", devices: int = 1, progress: bool = True) -> Checkpoint:
    """Train, or go on where a stopped run in the same folder left off.

    A run that is finished is not repeated: of its checkpoint only what ``run`` says of the images
    and the licence is changed.

    Args:
        run: What to do.
        device: ``auto``, ``cpu`` or ``cuda``.
        devices: How many of these share each batch, each in a process of its own; a script that
            calls this with more than one must do so under ``if __name__ == "__main__"``.
        progress: Whether to show progress bars.

    Returns:
        The checkpoint with the best validation accuracy, at ``run.out / "checkpoint"``.

    Raises:
        UsageError: ``run.out`` holds a run with other settings, or a setting makes no sense.
        DataError: The images cannot be used.
        CheckpointError: The checkpoint to start from cannot be used.
        BackendError: The device or its scan kernel is not available.
        TrainingError: There is too little memory, or the loss is no longer a number; the best of
            the finished epochs is then a checkpoint, which the error names.
        KeyboardInterrupt: Ctrl-C; the finished epochs are kept.
        SystemExit: SIGTERM; the finished epochs are kept.
    """
    target = _device(device)
    resolve("auto", target)
    _check_devices(devices, target, run.recipe)
    # Now, and not when the training is over.
    run.config(run.classes or ("a class",), {})
    if run.init is not None:
        check_initial(run.initial(), run.architecture)
    named = {} if run.classes is None else {"classes": run.classes}
    _compare(run.out, run.identity() | named)
    if (run.out / RESULT).exists():
        return restate(load_checkpoint(run.out / RESULT), run.said())
    failed = None
    try:
        if devices == 1:
            _train_share(run, target.type, progress, Share())
        else:
            run_ranks(partial(_train_share, run, target.type, progress), devices, target.type)
    except TrainingError as error:
        # Without its traceback, whose frames hold the images and the model: memory may be short.
        failed = TrainingError(error.problem, error.expected, error.remedy)
    if failed is not None:
        gc.collect()
        raise with_best(run, failed, name_of(target, devices))
    return write_result(run, open_state(run.out, BEST), run.out / RESULT, name_of(target, devices))


def _train_share(run: Run, kind: str, progress: bool, share: Share) -> None:
    """Train on one device, alone or as one of several, of which the first reports."""
    first = share.rank == 0
    target = torch.device(kind, share.rank) if kind == "cuda" else torch.device(kind)
    with _memory(run, kind):
        splits = _load(run, first and progress)
        if len(splits[1]) < share.ranks:
            raise UsageError(
                f"devices {share.ranks}", f"at most the {len(splits[1])} images of val", "use fewer"
            )
        teachers = _teachers(run, splits[0], target)
        if first:
            _begin(run, *splits)
        module = _make(run, splits[0], share, teachers)
        if run.init is not None and first and progress:
            started = head_of(run.initial().config, splits[0].classes, _head(splits[0]))
            tqdm.write(f"starting from {run.init}, {started}", file=sys.stderr)
        train_split, val_split = (split.to(target) for split in splits)
        if teachers is not None and first and progress:
            right = teachers.accuracy(val_split.pixels, val_split.labels)
            tqdm.write(f"teachers: validation accuracy {right:.4f} together", file=sys.stderr)
        fit(run.out, module, Progress(share.ranks), train_split, val_split, progress)


def _load(run: Run, progress: bool) -> tuple[Split, Split]:
    train, val = (
        load_split(run.data, name, run.preprocess, classes=run.classes, progress=progress)
        for name in ("train", "val")
    )
    _compare_classes(train, val)
    if run.classes is not None:
        _check_present(train)
    return train, val


def _begin(run: Run, train: Split, val: Split) -> None:
    """Claim the folder for this run, or find that it is its own."""
    identity = run.identity() | {
        "classes": train.classes,
        "head": _head(train),
        "train_images": len(train),
        "val_images": len(val),
    }
    _compare(run.out, identity)
    _claim(run.out, identity)


def _head(split: Split) -> str:
    return "sigmoid" if split.multi_label else "softmax"


def _teachers(run: Run, train: Split, target: torch.device) -> Teachers | None:
    if not run.teachers:
        return None
    return Teachers(run.taught_by(), train.classes, _head(train), str(target))


def _make(run: Run, train: Split, share: Share, teachers: Teachers | None) -> TrainingModule:
    """Return the model to train, equal in all processes."""
    torch.manual_seed(run.recipe.seed)
    model: nn.Module = create_model(run.architecture, len(train.classes))
    if run.init is not None:
        start_from(model, run.initial(), train.classes, _head(train))
    strengths = run.recipe.augmentation
    augmentation = Augmentation(run.preprocess.mean, run.preprocess.std, strengths, share)
    weights = class_weights(train.labels, len(train.classes), run.recipe.class_weighting)
    return TrainingModule(model, augmentation, run.recipe, weights, teachers)


def _is_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error)
    return said in _ONEDNN_NO_MEMORY or any(words in said for words in _NO_MEMORY)


@contextmanager
def _memory(run: Run, kind: str) -> Iterator[None]:
    """Say what to do where memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_of_memory(error):
            raise
        raise TrainingError(
            f"out of memory on {kind} with batch_size {run.recipe.batch_size} and input_size "
            f"{run.preprocess.input_size}",
            "a batch and images that fit",
            "use a smaller --batch-size or --input-size",
        ) from error


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r}", "auto, cpu or cuda", "choose one of these")
    if name == "cuda" and not torch.cuda.is_available():
        raise BackendError("device 'cuda' is not here", "an NVIDIA GPU", "use --device cpu")
    return torch.device(name)


def _check_devices(devices: int, target: torch.device, recipe: Recipe) -> None:
    if devices < 1:
        raise UsageError(f"devices {devices}", "at least 1", "give another number")
    if target.type == "cuda" and devices > torch.cuda.device_count():
        raise BackendError(
            f"devices {devices}", f"at most the {torch.cuda.device_count()} GPUs here", "use fewer"
        )
    if recipe.batch_size % devices or recipe.batch_size < 2 * devices:
        raise UsageError(
            f"batch_size {recipe.batch_size} on {devices} devices",
            "a multiple of the devices, at least 2 images on each",
            f"use a --batch-size such as {max(2, -(-recipe.batch_size // devices)) * devices}",
        )


def _compare_classes(train: Split, val: Split) -> None:
    for split, others, name, other in ((train, val, "train", "val"), (val, train, "val", "train")):
        missing = [label for label in split.classes if label not in others.classes]
        if missing:
            raise DataError(
                f"{name} has classes that {other} has not: {', '.join(missing)}",
                "the same classes in both",
                "add what is missing, or remove it",
            )


def _check_present(train: Split) -> None:
    """Refuse classes that were named and cannot be learned."""
    labels = train.labels
    present = labels.sum(0) if labels.ndim == 2 else labels.bincount(minlength=len(train.classes))
    absent = [name for name, count in zip(train.classes, present, strict=True) if count == 0]
    if absent:
        raise UsageError(
            f"classes {', '.join(absent)} without an image in train",
            "classes that are there",
            "correct or leave out these names, or add images",
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
    if not (out / f"{STATE}.ckpt").exists() and not (out / RESULT).exists():
        return  # no epoch was finished: there is nothing that other settings could spoil
    found = _flat(json.loads(path.read_text(encoding="utf-8")))
    wanted = _flat(json.loads(json.dumps(identity)))
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


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    augmentation: dict[str, Any] = identity.get("augmentation", {})
    return {k: v for k, v in identity.items() if k != "augmentation"} | augmentation


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
