"""Whole training runs on the CPU: the result, every way of stopping, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mambamic import Classifier
from mambamic.checkpoint import load_checkpoint
from mambamic.cli import main
from mambamic.errors import BackendError, DataError, UsageError
from mambamic.preprocess import Preprocess
from mambamic.training.data import load_split
from mambamic.training.recipe import Recipe
from mambamic.training.run import Run, train

SIZE = 32
COLOURS = {"blood": (200, 60, 60), "stain": (90, 60, 200)}
RECIPE = Recipe(epochs=6, warmup_epochs=1, batch_size=4, ema_decay=0.5)
SETTINGS = ["--epochs", "6", "--warmup-epochs", "1", "--batch-size", "4", "--ema-decay", "0.5"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small operations: where cores are shared, threads wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in colour: eight images to train on, six to validate."""
    random = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("data")
    for split, each in (("train", 4), ("val", 3)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(each):
                noise = random.integers(-40, 40, (SIZE, SIZE, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def run_in(data: Path, out: Path, **changes: Any) -> Run:
    return replace(Run(data, "mambamic_t", out, RECIPE, Preprocess(input_size=SIZE)), **changes)


def command(data: Path, out: Path) -> list[str]:
    """What a user types, apart from the name of the program."""
    return [
        *("train", str(data), "--arch", "mambamic_t", "--out", str(out), "--device", "cpu"),
        *("--input-size", str(SIZE), "--quiet", *SETTINGS),
    ]


def start(data: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mambamic", *command(data, out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def epochs_logged(out: Path) -> list[list[int]]:
    """Per start of a run, the epochs that were validated, from 0."""
    parts = []
    for path in sorted(out.glob("log/*/metrics.csv")):
        with path.open() as file:
            rows = list(csv.DictReader(file))
        parts.append([int(row["epoch"]) for row in rows if row["val_accuracy"]])
    return parts


def state(out: Path) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(out / "last.ckpt", map_location="cpu", weights_only=True)
    return saved


def epochs_done(out: Path) -> int:
    return int(state(out)["epoch"]) + 1


def stop_after_an_epoch(process: subprocess.Popen[str], out: Path, how: signal.Signals) -> None:
    """Send a signal as soon as the state was written, to a process that is still training."""
    path = out / "last.ckpt"
    before = path.stat().st_mtime_ns if path.exists() else 0
    deadline = time.monotonic() + 120
    while not (path.exists() and path.stat().st_mtime_ns > before):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(how)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    process = start(data, out)
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stderr) == (0, "")
    assert stdout.startswith(f"{out / 'checkpoint'}: validation accuracy 1.0000 (epoch ")
    assert len(stdout.splitlines()) == 1
    return out


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
        rows = [row for row in csv.DictReader(file) if row["val_accuracy"]]
    scores = [float(row["val_accuracy"]) for row in rows]
    metrics = load_checkpoint(finished / "checkpoint").config.metrics
    assert metrics["val_accuracy"] == pytest.approx(max(scores), abs=1e-5)
    assert metrics["best_epoch"] == scores.index(max(scores)) + 1
    assert epochs_done(finished) == 6


def test_the_run_says_what_it_was(finished: Path) -> None:
    stated = json.loads((finished / "run.json").read_text())
    assert stated["architecture"] == "mambamic_t"
    assert stated["classes"] == ["blood", "stain"]
    assert {name: stated[name] for name in RECIPE.as_dict()} == RECIPE.as_dict()


def test_the_card(finished: Path) -> None:
    card = load_checkpoint(finished / "checkpoint").card()
    assert card.startswith("# mambamic_t, 2 classes\n\nFor research use only")
    for line in (
        "- Classes: blood, stain",
        "- Input: the whole image resized to 32 x 32 (bilinear)",
        "| ema_decay | 0.5 |",
        "| validation (used to choose the epoch) | 6 | 1.0000 |",
    ):
        assert line in card.splitlines()


def test_stopped_in_every_way_it_ends_as_if_never_stopped(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "stopped"
    ways = ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143), (signal.SIGINT, 130))
    done = 0
    for part, (how, status) in enumerate(ways):
        process = start(data, out)
        stop_after_an_epoch(process, out, how)
        stdout, stderr = process.communicate(timeout=120)
        assert (process.returncode, stdout) == (status, "")
        hint = "stopped; the same command goes on after the last finished epoch\n"
        assert stderr == ("" if how == signal.SIGKILL else hint)
        assert not (out / "checkpoint").exists()
        assert epochs_logged(out)[part][0] == done
        done = epochs_done(out)
        # A folder may be moved before it is resumed.
        out = out.rename(tmp_path / f"moved_{part}")

    resumed = train(run_in(data, out), device="cpu", progress=False)
    assert epochs_logged(out)[-1] == list(range(done, 6))
    whole = load_checkpoint(finished / "checkpoint")
    assert resumed.config.metrics["best_epoch"] == whole.config.metrics["best_epoch"]
    # Not the checkpoint alone, which may be of an early epoch: the last state, average and all.
    expected, found = state(finished)["state_dict"], state(out)["state_dict"]
    assert expected.keys() == found.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], msg=key)


def test_a_finished_run_is_not_repeated(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(finished, tmp_path / "copy")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert main(command(data, out)) == 0
    assert "validation accuracy 1.0000" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_finished_run_can_be_described_anew(data: Path, finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "copy")
    described = run_in(data, out, licence="CC-BY-4.0", mpp=0.25, training_data="Two colours")
    checkpoint = train(described, device="cpu", progress=False)
    before = load_checkpoint(finished / "checkpoint").config
    expected = replace(before, licence="CC-BY-4.0", mpp=0.25, training_data="Two colours")
    assert checkpoint.config == expected == load_checkpoint(out / "checkpoint").config
    assert "- Licence: CC-BY-4.0" in checkpoint.card()
    assert epochs_logged(out) == epochs_logged(finished)


def test_a_lost_result_is_written_again(data: Path, finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(out / "checkpoint")
    checkpoint = train(run_in(data, out), device="cpu", progress=False)
    assert checkpoint.config == load_checkpoint(finished / "checkpoint").config
    assert epochs_logged(out) == epochs_logged(finished)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": replace(RECIPE, epochs=7)}, "holds a run with epochs 6 and not 7; expected"),
        ({"recipe": replace(RECIPE, seed=1)}, "seed 0 and not 1"),
        ({"architecture": "mambamic_s"}, "architecture 'mambamic_t' and not 'mambamic_s'"),
        (
            {"preprocess": Preprocess(64, resize="shorter_side")},
            "input_size 32 and not 64, resize 'stretch' and not 'shorter_side'",
        ),
    ],
)
def test_other_settings_are_refused(
    changes: dict[str, Any], message: str, data: Path, finished: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        train(run_in(data, finished, **changes), device="cpu", progress=False)


def test_other_images_are_refused(data: Path, finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(out / "checkpoint")
    fewer = shutil.copytree(data, tmp_path / "fewer")
    (fewer / "val/blood/0.png").unlink()
    with pytest.raises(UsageError, match="val_images 6 and not 5"):
        train(run_in(fewer, out), device="cpu", progress=False)


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
    assert "example:\n  mambamic train " in out
    assert "exit status" in out
    assert all("--" + name.replace("_", "-") in out for name in RECIPE.as_dict())


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
    assert "usage: mambamic train" in capsys.readouterr().err
