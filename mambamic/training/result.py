"""What a run leaves: the best epoch as a checkpoint, at its end or before a failure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mambamic.checkpoint import Checkpoint, save_checkpoint
from mambamic.errors import TrainingError
from mambamic.training.card import model_card
from mambamic.training.fit import BEST, MONITOR, STATE, Progress
from mambamic.training.initial import head_of

if TYPE_CHECKING:
    from mambamic.training.run import Run

RUN_FILE = "run.json"


def write_result(
    run: Run, best: dict[str, Any], place: Path, used: str, ended: str = ""
) -> Checkpoint:
    """Write the best epoch's state as a checkpoint, described by what the run's folder says.

    Args:
        run: What was trained.
        best: The state.
        place: The checkpoint's folder.
        used: The devices.
        ended: Why training ended before its time, if it did.
    """
    stated = json.loads((run.out / RUN_FILE).read_text(encoding="utf-8"))
    classes, head = tuple(stated["classes"]), stated["head"]
    prefix = "average.module."
    weights = {
        key.removeprefix(prefix): tensor
        for key, tensor in best["state_dict"].items()
        if key.startswith(prefix)
    }
    scores = next(state for state in best["callbacks"].values() if state.get("monitor") == MONITOR)
    clock = Progress()
    clock.load_state_dict(open_state(run.out, STATE)["callbacks"][clock.state_key])
    metrics = {
        "val_accuracy": round(float(scores["best_model_score"]), 5),
        "val_images": stated["val_images"],
        "train_images": stated["train_images"],
        "best_epoch": int(best["epoch"]) + 1,
        "epochs": clock.epochs,
        "minutes": round(clock.seconds / 60, 1),
        "images_per_second": round(clock.images / max(clock.seconds, 1e-9)),
        "device": used,
        "seed": run.recipe.seed,
        "torch": torch.__version__,
    }
    if run.init is not None:
        before = run.initial().config
        metrics["init"] = f"{before.weights_sha256}, {head_of(before, classes, head)}"
    if run.teachers:
        taught = [teacher.config for teacher in run.taught_by()]
        metrics["teachers"] = [f"{each.architecture} {each.weights_sha256}" for each in taught]
    if ended:
        metrics["ended_early"] = ended
    config = run.config(classes, metrics, head)
    return save_checkpoint(place, config, weights, model_card(config, run.recipe), half=True)


def with_best(run: Run, error: TrainingError, used: str) -> TrainingError:
    """Keep the best epoch so far where it can be used, and return an error that says where.

    Args:
        run: What failed.
        error: Why.
        used: As for ``write_result``.
    """
    if not all((run.out / f"{name}.ckpt").exists() for name in (STATE, BEST)):
        kept = "no epoch was finished"
    else:
        try:
            epoch, place = _keep_best(run, error.problem, used)
            kept = (
                f"epoch {epoch}, the best before, is kept as a checkpoint, also for --init: {place}"
            )
        except (OSError, MemoryError, RuntimeError) as second:  # which must not hide the first
            kept = f"the best epoch before could not be made a checkpoint ({second})"
    return TrainingError(error.problem, error.expected, f"{error.remedy}; {kept}")


def _keep_best(run: Run, ended: str, used: str) -> tuple[int, Path]:
    best = open_state(run.out, BEST)
    epoch = int(best["epoch"]) + 1
    place = run.out / f"best_epoch_{epoch}"
    if not place.exists():
        write_result(run, best, place, used, ended)
    return epoch, place


def open_state(out: Path, name: str) -> dict[str, Any]:
    """Open a state that Lightning wrote, without reading what is not used of it."""
    saved: dict[str, Any] = torch.load(
        out / f"{name}.ckpt", map_location="cpu", weights_only=True, mmap=True
    )
    return saved


def name_of(target: torch.device, devices: int) -> str:
    """Return what the card says of the devices."""
    name = torch.cuda.get_device_name(target) if target.type == "cuda" else "CPU"
    return name if devices == 1 else f"{devices} x {name}"
