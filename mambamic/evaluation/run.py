"""``evaluate``: from a checkpoint and a data set to a folder of results."""

from __future__ import annotations

import datetime
import json
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mambamic.checkpoint import Checkpoint, exchange, load_checkpoint
from mambamic.classifier import Classifier
from mambamic.errors import UsageError
from mambamic.evaluation.calibration import fit_temperature, store_temperature, tempered
from mambamic.evaluation.plots import confusion_plot, reliability_plot, roc_plot
from mambamic.evaluation.predictions import Predictions, predict, truth_of
from mambamic.evaluation.report import render
from mambamic.evaluation.summary import Measured, predictions_csv
from mambamic.training.data import Split, load_split

METRICS, PREDICTIONS, REPORT = "metrics.json", "predictions.csv", "report.html"
CONFUSION, ROC, RELIABILITY = "confusion_matrix.png", "roc.png", "reliability.png"
FILES = (METRICS, PREDICTIONS, REPORT, CONFUSION, ROC, RELIABILITY)
CALIBRATION_SPLIT = "val"


@dataclass(frozen=True)
class Evaluation:
    """What is to be evaluated, and how.

    Args:
        checkpoint: Its folder.
        data: The data set, as ``load_split`` reads it.
        out: Folder for the results.
        split: Usually ``test`` or ``val``.
        calibrate: Fit a temperature on the validation split and store it in the checkpoint.
        device: As ``Classifier.load`` has it.
        dtype: Likewise.
        batch_size: Images at a time; None for what suits the device.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
        force: Whether an earlier evaluation in ``out`` is replaced.
        command: How it was called, for the record.
    """

    checkpoint: Path
    data: Path
    out: Path
    split: str = "test"
    calibrate: bool = False
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = None
    resamples: int = 1000
    seed: int = 0
    force: bool = False
    command: str = "mambamic.evaluation.run.evaluate"


@dataclass(frozen=True)
class Calibration:
    """A temperature that was fitted.

    Args:
        temperature: The new one.
        earlier: The one that the checkpoint had, 1 where it had none.
        images: Of the validation split.
        before: The evaluated split with the earlier one.
    """

    temperature: float
    earlier: float
    images: int
    before: Measured


def evaluate(task: Evaluation, *, progress: bool = False) -> dict[str, Any]:
    """Evaluate a checkpoint and write the folder of results.

    Args:
        task: What and how.
        progress: Whether to show progress bars.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        UsageError: ``out`` is taken, or an argument makes no sense.
        CheckpointError: The checkpoint is damaged, or cannot be written to.
        DataError: The data set cannot be used.
        BackendError: The device is not here.
    """
    _check_out(task.out, task.force)
    opened = load_checkpoint(task.checkpoint)
    # For a fit, probabilities as the network gives them; a temperature is easily put on them.
    bare = Checkpoint(opened.path, replace(opened.config, temperature=None))
    classifier = Classifier.load(
        bare if task.calibrate else opened, task.device, dtype=task.dtype, max_batch=task.batch_size
    )
    split, predictions = _predict(task, classifier, task.split, progress)
    calibration = None
    if task.calibrate:
        fitted_on = predictions
        if task.split != CALIBRATION_SPLIT:
            _, fitted_on = _predict(task, classifier, CALIBRATION_SPLIT, progress)
        temperature, earlier = fit_temperature(fitted_on), opened.config.temperature or 1.0
        before = Measured.of(tempered(predictions, earlier), task.resamples, task.seed)
        calibration = Calibration(temperature, earlier, len(fitted_on), before)
        predictions = tempered(predictions, temperature)
    measured = Measured.of(predictions, task.resamples, task.seed)
    results = _results(task, opened, classifier, measured, calibration)
    with _folder(task.out) as folder:
        _write(folder, results, split, measured, calibration)
        if calibration is not None:
            store_temperature(opened, calibration.temperature)
    return results


def _predict(
    task: Evaluation, classifier: Classifier, name: str, progress: bool
) -> tuple[Split, Predictions]:
    config = classifier.config
    split = load_split(
        task.data, name, config.preprocess, classes=config.classes, progress=progress
    )
    truth = truth_of(split.labels, config)
    probabilities = predict(classifier, split.pixels.numpy(), progress=progress)
    return split, Predictions(config.classes, truth, probabilities, config.head == "sigmoid")


def _results(
    task: Evaluation,
    checkpoint: Checkpoint,
    classifier: Classifier,
    measured: Measured,
    calibration: Calibration | None,
) -> dict[str, Any]:
    notes = measured.notes()
    fitted = None
    if calibration is not None:
        fitted = {
            "temperature": calibration.temperature,
            "temperature_before": calibration.earlier,
            "fitted_on": CALIBRATION_SPLIT,
            "images": calibration.images,
            "before": calibration.before.overall_json(),
        }
        if task.split == CALIBRATION_SPLIT:
            notes.append(
                "The temperature was fitted on these very images: on others, calibration error, "
                "Brier score and negative log likelihood will be a little higher."
            )
    return {
        "kind": measured.predictions.kind,
        "split": task.split,
        "images": len(measured.predictions),
        "overall": measured.overall_json(),
        "classes": measured.classes_json(),
        "confusion": measured.confusion_json(),
        "calibration": fitted,
        "notes": notes,
        "intervals": {"level": 0.95, "resamples": task.resamples, "seed": task.seed},
        "run": {
            "command": task.command,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "checkpoint": str(task.checkpoint),
            "weights_sha256": checkpoint.config.weights_sha256,
            "temperature": (
                checkpoint.config.temperature if calibration is None else calibration.temperature
            ),
            "data": str(task.data),
            "platform": platform.platform(),
            "inference": classifier.describe(),
            "metrics_by": {name: version(name) for name in ("torchmetrics", "numpy")},
        },
    }


def _write(
    folder: Path,
    results: dict[str, Any],
    split: Split,
    measured: Measured,
    calibration: Calibration | None,
) -> None:
    predictions = measured.predictions
    series = [("", predictions)]
    if calibration is not None:
        series = [
            (f"before, temperature {calibration.earlier:.3g}", calibration.before.predictions),
            (f"after, temperature {calibration.temperature:.3g}", predictions),
        ]
    plots = {
        CONFUSION: confusion_plot(predictions),
        ROC: roc_plot(predictions, measured.values.by_class["auc"]),
        RELIABILITY: reliability_plot(series),
    }
    for name, data in plots.items():
        (folder / name).write_bytes(data)
    texts = {
        METRICS: json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        PREDICTIONS: predictions_csv(predictions, split.names),
        REPORT: render(results, plots, predictions, split.names, split.pixels.numpy()),
    }
    for name, text in texts.items():
        # The bytes of a file's name need not be text: what is not, becomes "\udc..".
        (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")


def _check_out(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not force:
        raise UsageError(
            f"{out} exists", "a new folder for the results", "give another, or add --force"
        )
    others = [out] if not out.is_dir() else [p for p in out.iterdir() if p.name not in FILES]
    if others:
        raise UsageError(
            f"{others[0]} is in the way of --force",
            "a folder that holds an evaluation and nothing else",
            "give another folder",
        )


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """Provide a folder that is put in the place of ``out`` if all goes well."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise UsageError(
            f"{out} cannot be made ({error.strerror})", "a place to write to", "give another folder"
        ) from error
    with temporary as name:
        fresh = Path(name, "evaluation")
        fresh.mkdir()
        yield fresh
        exchange(fresh, out)
