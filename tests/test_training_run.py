"""Whole training runs on the CPU: the result, what it starts from, and what is refused."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mambamic import Classifier
from mambamic.checkpoint import load_checkpoint
from mambamic.cli import main
from mambamic.errors import BackendError, DataError, UsageError
from mambamic.preprocess import Preprocess
from mambamic.training.data import load_split
from mambamic.training.run import train

from .training_runs import (
    RECIPE,
    SIZE,
    command,
    epochs_done,
    one_torch_thread,
    run_in,
    run_to_the_end,
    write_two_colours,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_two_colours(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_to_the_end(data, tmp_path_factory.mktemp("runs") / "finished")


def test_the_result_is_as_good_as_it_says(data: Path, finished: Path) -> None:
    classifier = Classifier.load(finished / "checkpoint", device="cpu")
    assert classifier.config.classes == ("blood", "stain")
    assert classifier.config.input_size == SIZE
    val = load_split(data, "val", classifier.preprocess)
    found = classifier.probabilities(val.pixels.numpy()).argmax(1)
    metrics = classifier.config.metrics
    accuracy = (found == val.labels.numpy()).mean()
    assert metrics["val_accuracy"] == pytest.approx(accuracy, abs=1e-5)
    assert accuracy == 1.0, "red and blue were not told apart"
    assert (metrics["train_images"], metrics["val_images"]) == (8, 6)
    assert 1 <= metrics["best_epoch"] <= metrics["epochs"] == 6
    assert metrics["images_per_second"] > 0


def test_the_weights_are_those_of_the_best_epoch(finished: Path) -> None:
    with next(finished.glob("log/*/metrics.csv")).open() as file:
        every = list(csv.DictReader(file))
    rows = [row for row in every if row["val_accuracy"]]
    scores = [float(row["val_accuracy"]) for row in rows]
    metrics = load_checkpoint(finished / "checkpoint").config.metrics
    assert metrics["val_accuracy"] == pytest.approx(max(scores), abs=1e-5)
    assert metrics["best_epoch"] == scores.index(max(scores)) + 1
    rates = [float(row["images_per_second"]) for row in every if row["images_per_second"]]
    assert len(rates) == 6
    assert 0 < min(rates) <= metrics["images_per_second"] <= max(rates) + 1
    assert epochs_done(finished) == 6


def test_the_run_says_what_it_was(finished: Path) -> None:
    stated = json.loads((finished / "run.json").read_text())
    assert stated["architecture"] == "mambamic_t"
    assert stated["classes"] == ["blood", "stain"]
    expected = json.loads(json.dumps(RECIPE.as_dict()))
    assert {name: stated[name] for name in expected} == expected
    assert stated["augmentation"]["stain"] == 0.05


def test_the_card(finished: Path) -> None:
    card = load_checkpoint(finished / "checkpoint").card()
    assert card.startswith("# mambamic_t, 2 classes\n\nFor research use only")
    for line in (
        "- Classes: blood, stain",
        "- Input: the whole image resized to 32 x 32 (bilinear)",
        "| ema_decay | 0.5 |",
        "| stain | 0.05 |",
        "Started from: random weights",
        "| validation (used to choose the epoch) | 6 | 1.0000 |",
    ):
        assert line in card.splitlines()


def test_starts_from_a_checkpoint_with_a_new_head(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(data, tmp_path / "other")
    for split in ("train", "val"):
        shutil.copytree(other / split / "blood", other / split / "third")
    base = load_checkpoint(finished / "checkpoint")
    run = run_in(other, tmp_path / "out", init=base.path, recipe=replace(RECIPE, epochs=2))
    checkpoint = train(run, device="cpu")
    shown = capsys.readouterr()
    said = f"starting from {base.path}, with a new head: it had 2 other classes, now 3"
    assert said in shown.err
    assert "epoch 2 of 2: train_loss " in shown.err
    assert shown.out == ""
    assert checkpoint.config.classes == ("blood", "stain", "third")
    stated = json.loads((tmp_path / "out/run.json").read_text())
    assert stated["init"] == base.config.weights_sha256
    assert f"Started from: {base.config.weights_sha256}, with a new head" in checkpoint.card()
    with pytest.raises(UsageError, match=r"init '.*' and not None"):
        train(replace(run, init=None), device="cpu", progress=False)


def test_starts_from_a_checkpoint_with_its_head(data: Path, finished: Path, tmp_path: Path) -> None:
    """At a rate of next to nothing the weights stay those of the checkpoint."""
    base = load_checkpoint(finished / "checkpoint")
    still = replace(RECIPE, epochs=1, warmup_epochs=0, learning_rate=1e-12)
    run = run_in(data, tmp_path / "out", init=base.path, recipe=still)
    checkpoint = train(run, device="cpu", progress=False)
    assert "with its head of 2 classes" in checkpoint.card()
    before, after = base.state_dict(), checkpoint.state_dict()
    for key in ("head.weight", "head.bias"):
        torch.testing.assert_close(after[key], before[key], rtol=1e-3, atol=1e-5)


def test_starts_from_no_other_architecture(data: Path, finished: Path, tmp_path: Path) -> None:
    run = run_in(data, tmp_path, architecture="medmamba_t", init=finished / "checkpoint")
    with pytest.raises(UsageError, match="is a mambamic_t; expected a checkpoint of medmamba_t"):
        train(run, device="cpu", progress=False)


def test_classes_in_the_order_asked_for(data: Path, tmp_path: Path) -> None:
    call = [*command(data, tmp_path / "out"), "--epochs", "2", "--classes", "stain", "blood"]
    assert main(call) == 0
    assert load_checkpoint(tmp_path / "out/checkpoint").config.classes == ("stain", "blood")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["stain", "blood", "third"], "classes third without an image in train; expected"),
        (["stain", "blood", "blood"], "'classes' is ('stain', 'blood', 'blood'); expected"),
    ],
)
def test_classes_that_cannot_be_learned(
    classes: list[str],
    message: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*command(data, tmp_path / "out"), "--classes", *classes]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_progress_on_a_terminal(data: Path, tmp_path: Path) -> None:
    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))
    call = [argument for argument in command(data, tmp_path / "out") if argument != "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mambamic", *call, "--epochs", "2"],
        stdout=subprocess.PIPE,
        stderr=its,
        text=True,
    )
    os.close(its)
    shown = read_to_the_end(mine)
    assert process.stdout is not None
    with process.stdout:
        result = process.stdout.read()
    assert process.wait(120) == 0
    assert result.startswith(f"{tmp_path / 'out/checkpoint'}: validation accuracy ")
    assert len(result.splitlines()) == 1
    assert "epoch 2 of 2: " in shown
    assert "v_num" not in shown


def read_to_the_end(terminal: int) -> str:
    """What was written to a terminal until all who had it open have ended."""
    parts = []
    # EIO is raised when nobody has it open any more.
    with open(terminal, "rb", buffering=0) as file, suppress(OSError):
        while part := file.read(65536):
            parts.append(part)
    return b"".join(parts).decode()


def test_a_recipe_file(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text("epochs = 50\nclass_weighting = 'balanced'\n[augmentation]\nstain = 0.0\n")
    call = [*command(data, tmp_path / "out"), "--recipe", str(mine), "--epochs", "2", "--hue", "0"]
    assert main(call) == 0
    stated = json.loads((tmp_path / "out/run.json").read_text())
    assert (stated["epochs"], stated["class_weighting"]) == (2, "balanced")
    assert (stated["augmentation"]["stain"], stated["augmentation"]["hue"]) == (0.0, 0.0)
    mine.write_text("epoch = 50")
    capsys.readouterr()
    assert main(call) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mambamic train: {mine}: unknown key 'epoch'; expected one of epochs")


def test_curves_for_tensorboard(finished: Path) -> None:
    events = EventAccumulator(str(next(finished.glob("tensorboard/version_0"))))
    events.Reload()
    with next(finished.glob("log/*/metrics.csv")).open() as file:
        scores = [float(row["val_accuracy"]) for row in csv.DictReader(file) if row["val_accuracy"]]
    assert [event.value for event in events.Scalars("val_accuracy")] == pytest.approx(scores)


def test_classes_that_differ_are_named(data: Path, tmp_path: Path) -> None:
    other = shutil.copytree(data, tmp_path / "other")
    (other / "val/stain").rename(other / "val/other")
    with pytest.raises(DataError, match="train has classes that val has not: stain"):
        train(run_in(other, tmp_path / "out"), device="cpu", progress=False)
    shutil.copytree(data / "val/stain", other / "val/stain")
    with pytest.raises(DataError, match="val has classes that train has not: other"):
        train(run_in(other, tmp_path / "out"), device="cpu", progress=False)
    assert not (tmp_path / "out").exists(), "a run that never began claims its folder"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mambamic_x"}, "'mambamic_x'"),
        ({"preprocess": Preprocess(input_size=16)}, "'input_size' is 16"),
        (
            {"architecture": "medmamba_t", "preprocess": Preprocess(input_size=30)},
            "'input_size' is 30; expected at least 32 for medmamba_t",
        ),
        ({"preprocess": Preprocess(mean=(128, 128, 128))}, "expected three numbers from 0 to 1"),
        ({"mpp": -1.0}, "'mpp' is -1.0"),
        ({"licence": ""}, "'licence' is ''"),
    ],
)
def test_what_no_checkpoint_can_state_is_refused_before_training(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        train(run_in(tmp_path / "nowhere", tmp_path / "out", **changes), device="cpu")


def test_a_folder_in_the_way(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file cannot be written \(File exists\)"):
        train(run_in(data, tmp_path / "file"), device="cpu", progress=False)
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(UsageError, match="checkpoint is not from a run in"):
        train(run_in(data, tmp_path), device="cpu", progress=False)


def test_devices_that_are_not_there(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="device 'tpu'"):
        train(run_in(data, tmp_path / "out"), device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match=r"device 'cuda' is not here.*--device cpu"):
            train(run_in(data, tmp_path / "out"), device="cuda")


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["train", "--help"])
    assert status.value.code == 0
    out = capsys.readouterr().out
    assert "examples:\n  mambamic train " in out
    assert "exit status" in out
    stated = RECIPE.as_dict()
    settings = [*stated.pop("augmentation"), *stated]
    assert [name for name in settings if "--" + name.replace("_", "-") not in out] == []


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 1, "has neither train/ nor train.zip"),
        (["--epochs", "0"], 2, "epochs 0; expected at least 1"),
        (["--arch", "resnet"], 2, "'resnet'"),
        (["--device", "tpu"], 2, "device 'tpu'"),
    ],
)
def test_calls_that_fail(
    arguments: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*command(tmp_path, tmp_path / "out"), *arguments]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mambamic train: ")
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["train"], ["train", "data"], ["train", "--epochs", "x"]])
def test_a_wrong_call(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(arguments)
    assert status.value.code == 2
    error = capsys.readouterr().err
    assert "usage: mambamic train" in error
    assert len(error.splitlines()) == 2, "the options hide the error"
