"""Whole training runs on the CPU: the result, every way of stopping, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import random
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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mambamic import Classifier
from mambamic.checkpoint import load_checkpoint
from mambamic.cli import main
from mambamic.errors import BackendError, DataError, TrainingError, UsageError
from mambamic.preprocess import Preprocess
from mambamic.training.data import load_split
from mambamic.training.recipe import Recipe, Strengths
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


def start(data: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mambamic", *command(data, out), *more],
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


def measured(out: Path) -> dict[str, Any]:
    """What the result says of itself, apart from how long it took."""
    metrics = load_checkpoint(out / "checkpoint").config.metrics
    return {k: v for k, v in metrics.items() if k not in ("minutes", "images_per_second")}


def test_killed_at_any_moment_it_ends_with_the_very_same_numbers(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    process = start(data, out)
    while not (out / "run.json").exists():  # from here on, training takes a few seconds
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    for _ in range(3):
        time.sleep(moments.uniform(0, 4))
        process.kill()
        process.communicate()
        process = start(data, out)
        time.sleep(2)  # at the least, to begin at all
    _, stderr = process.communicate(timeout=120)
    assert (process.returncode, stderr) == (0, "")
    assert measured(out) == measured(finished), seed
    expected, found = state(finished)["state_dict"], state(out)["state_dict"]
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == [], seed
    weights = [(path / "checkpoint/model.safetensors").read_bytes() for path in (finished, out)]
    assert weights[0] == weights[1], seed


def test_stopped_on_two_devices_it_goes_on_with_one(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "several"
    process = start(data, out, "--devices", "2")
    stop_after_an_epoch(process, out, signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    hint = "stopped; the same command goes on after the last finished epoch\n"
    assert (process.returncode, stdout, stderr) == (143, "", hint)
    done = epochs_done(out)
    checkpoint = train(run_in(data, out), device="cpu", progress=False)
    assert epochs_logged(out) == [list(range(done)), list(range(done, 6))]
    assert checkpoint.config.metrics["epochs"] == 6
    assert state(out)["callbacks"]["Progress"]["images"] == 6 * 8


def test_two_devices_to_the_end(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    checkpoint = train(run_in(data, out), device="cpu", devices=2, progress=False)
    assert checkpoint.config.metrics["device"] == "2 x CPU"
    assert checkpoint.config.metrics["val_accuracy"] > 0.9
    assert epochs_logged(out) == [list(range(6))]


def test_batches_that_devices_cannot_share(data: Path, tmp_path: Path) -> None:
    message = "batch_size 4 on 3 devices; expected a multiple .* such as 6$"
    with pytest.raises(UsageError, match=message):
        train(run_in(data, tmp_path / "out"), device="cpu", devices=3, progress=False)


def test_a_learning_rate_that_is_too_large(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wild = replace(RECIPE, learning_rate=1e30, clip_norm=0.0, warmup_epochs=0)
    with pytest.raises(TrainingError, match=r"epoch \d .*1e\+30.*smaller --learning-rate"):
        train(run_in(data, out, recipe=wild), device="cpu", progress=False)
    assert not (out / "checkpoint").exists()
    assert not (out / "last.ckpt").exists(), "a state without a future is kept"
    # Nothing was finished: the folder may be used with other settings.
    tame = replace(RECIPE, epochs=2)
    assert train(run_in(data, out, recipe=tame), device="cpu", progress=False).path.exists()


def test_a_late_failure_keeps_the_last_good_state(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(out / "checkpoint")
    # As if it had been stopped after four of six epochs, and diverged when it went on.
    run = run_in(data, out)
    process = start(data, tmp_path / "stopped")
    stop_after_an_epoch(process, tmp_path / "stopped", signal.SIGKILL)
    process.communicate()
    saved = state(tmp_path / "stopped")
    shutil.copy(tmp_path / "stopped/best.ckpt", out / "best.ckpt")
    whole = {**saved, "state_dict": dict(saved["state_dict"])}
    whole["state_dict"]["model.head.bias"] = whole["state_dict"]["model.head.bias"] + torch.nan
    torch.save(whole, out / "last.ckpt")
    epoch = int(saved["epoch"]) + 2
    with pytest.raises(TrainingError, match=f"since step 1 of epoch {epoch} "):
        train(run, device="cpu", progress=False)
    assert epochs_done(out) == epoch - 1, "a state that is no good was kept"
    torch.save(saved, out / "last.ckpt")
    train(run, device="cpu", progress=False)
    assert measured(out)["epochs"] == 6


_SHORT_OF_MEMORY = """
import resource, sys, threading
from mambamic.cli import main
from mambamic.cli import train_command  # and all that it imports
import mambamic.training.run, pytorch_lightning
import torch
torch.set_num_threads(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + 600 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(sys.argv[1:]))
"""


def test_out_of_memory_says_what_to_make_smaller(data: Path, tmp_path: Path) -> None:
    call = [*command(data, tmp_path / "out"), "--input-size", "512", "--batch-size", "8"]
    done = subprocess.run(
        [sys.executable, "-c", _SHORT_OF_MEMORY, *call], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    said = "mambamic train: out of memory on cpu with batch_size 8 and input_size 512; expected "
    assert said in done.stderr
    assert "smaller --batch-size or --input-size" in done.stderr
    assert "Traceback" not in done.stderr


def test_starts_from_a_checkpoint_with_a_new_head(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(data, tmp_path / "other")
    for split in ("train", "val"):
        shutil.copytree(other / split / "blood", other / split / "third")
    base = load_checkpoint(finished / "checkpoint")
    run = run_in(other, tmp_path / "out", init=base.path, recipe=replace(RECIPE, epochs=2))
    checkpoint = train(run, device="cpu")
    said = f"starting from {base.path}, with a new head: it had 2 other classes, now 3"
    assert said in capsys.readouterr().err
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


def test_patience_ends_a_run_for_good(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # At this rate the loss rises at once.
    recipe = replace(RECIPE, patience=1, learning_rate=1e-12, epochs=50, ema_decay=0.0)
    checkpoint = train(run_in(data, out, recipe=recipe), device="cpu", progress=False)
    epochs = checkpoint.config.metrics["epochs"]
    assert epochs < 50
    shutil.rmtree(out / "checkpoint")
    again = train(run_in(data, out, recipe=recipe), device="cpu", progress=False)
    assert again.config == checkpoint.config
    assert epochs_logged(out) == [list(range(epochs))]


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
        (
            {"recipe": replace(RECIPE, augmentation=Strengths(stain=0.3))},
            "with stain 0.05 and not 0.3; expected",
        ),
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
    assert "usage: mambamic train" in capsys.readouterr().err
