"""Every way in which a training run ends early, goes on, or is over."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mambamic.checkpoint import OOD_FILE, Checkpoint, load_checkpoint
from mambamic.cli import main
from mambamic.errors import TrainingError, UsageError
from mambamic.evaluation.calibration import store_temperature
from mambamic.preprocess import Preprocess
from mambamic.training import result
from mambamic.training.module import TrainingModule
from mambamic.training.recipe import Strengths
from mambamic.training.run import train

from .training_runs import (
    RECIPE,
    command,
    epochs_done,
    epochs_logged,
    measured,
    one_torch_thread,
    run_in,
    run_to_the_end,
    start,
    state,
    stop_after_an_epoch,
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
    # The last kill may have come after the end.
    assert process.returncode == 0, stderr
    assert stderr == "" or "nothing was trained" in stderr
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
    # Each device normalises its own images: two would be too few to learn from.
    recipe = replace(RECIPE, batch_size=8, learning_rate=2.4e-3)
    run = run_in(data, out, recipe=recipe)
    checkpoint = train(run, device="cpu", devices=2, progress=False)
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
    said = r"epoch \d .*1e\+30.*smaller --learning-rate; no epoch was finished$"
    with pytest.raises(TrainingError, match=said):
        train(run_in(data, out, recipe=wild), device="cpu", progress=False)
    assert not (out / "checkpoint").exists()
    assert not (out / "last.ckpt").exists(), "a state without a future is kept"
    # Nothing was finished: the folder may be used with other settings.
    tame = replace(RECIPE, epochs=2)
    assert train(run_in(data, out, recipe=tame), device="cpu", progress=False).path.exists()


def test_a_late_failure_keeps_the_last_good_state(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(out / "checkpoint")
    # As if it had been stopped after two of six epochs, and diverged when it went on.
    run = run_in(data, out)
    whole_loss = TrainingModule.loss

    def loss(module: TrainingModule, *batch: torch.Tensor) -> torch.Tensor:
        if module.current_epoch == 2:
            raise SystemExit
        return whole_loss(module, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "loss", loss)
        with pytest.raises(SystemExit):
            train(run_in(data, tmp_path / "stopped"), device="cpu", progress=False)
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


def test_the_best_epoch_before_a_failure_is_a_checkpoint_like_any_other(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, place = tmp_path / "out", tmp_path / "out/best_epoch_1"
    # One step an epoch; the second is so large that no number is left after it.
    wild = [*("--batch-size", "8", "--learning-rate", "1e30", "--warmup-start", "1e-33")]
    call = [*command(data, out), *wild, "--clip-norm", "0", "--licence", "MIT"]
    assert main(call) == 1
    said = capsys.readouterr().err
    assert "not a finite number since step 1 of epoch 2 (learning_rate 1e+30)" in said
    assert said.endswith(f"is kept as a checkpoint, also for --init: {place}\n")
    assert epochs_done(out) == 1, "an epoch that is no good was kept"
    before = place.stat().st_ino
    assert main(call) == 1, "it was trained again"
    assert capsys.readouterr().err == said
    assert place.stat().st_ino == before

    kept = load_checkpoint(place)
    assert (kept.config.classes, kept.config.licence) == (("blood", "stain"), "MIT")
    assert (kept.config.metrics["best_epoch"], kept.config.metrics["epochs"]) == (1, 1)
    assert "Training ended before its time: the loss or its gradient is not" in kept.card()
    cell = str(data / "val/blood/0.png")
    assert main(["predict", str(place), cell, "--device", "cpu"]) == 0
    evaluated = ["evaluate", str(place), str(data), "--split", "val", "--bootstrap", "10"]
    assert main([*evaluated, "--device", "cpu", "--out", str(tmp_path / "evaluation")]) == 0
    tuned = [*command(data, tmp_path / "tuned"), "--epochs", "2", "--init", str(place)]
    assert main(tuned) == 0
    card = load_checkpoint(tmp_path / "tuned/checkpoint").card()
    assert f"Started from: {kept.config.weights_sha256}, with its head of 2 classes" in card
    assert "ended before" not in card


def test_the_best_epoch_before_a_failure_on_two_devices(data: Path, tmp_path: Path) -> None:
    wild = replace(RECIPE, batch_size=8, learning_rate=1e30, warmup_start=1e-33, clip_norm=0.0)
    run = run_in(data, tmp_path / "out", recipe=wild)
    with pytest.raises(TrainingError, match=r"best_epoch_1$"):
        train(run, device="cpu", devices=2, progress=False)
    config = load_checkpoint(tmp_path / "out/best_epoch_1").config
    assert config.metrics["device"] == "2 x CPU"


def test_memory_is_free_again_where_the_best_epoch_before_is_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules: list[weakref.ref[TrainingModule]] = []

    def loss(module: TrainingModule, *batch: torch.Tensor) -> torch.Tensor:
        modules.append(weakref.ref(module))
        if module.current_epoch == 1:
            raise MemoryError
        return whole(module, *batch)

    def export(*arguments: Any) -> Checkpoint:
        assert modules[0]() is None, "the model that there was no memory for is still held"
        return written(*arguments)

    whole, written = TrainingModule.loss, result.write_result
    monkeypatch.setattr(TrainingModule, "loss", loss)
    monkeypatch.setattr(result, "write_result", export)
    out = tmp_path / "out"
    said = rf"out of memory on cpu .* smaller --batch-size or --input-size; epoch 1, .*: {out}/best"
    with pytest.raises(TrainingError, match=said):
        train(run_in(data, out), device="cpu", progress=False)
    assert load_checkpoint(out / "best_epoch_1").config.metrics["epochs"] == 1

    shutil.rmtree(out / "best_epoch_1")
    (out / "best.ckpt").write_bytes(b"")
    said = r"out of memory on cpu .*; the best epoch before could not be made a checkpoint \("
    with pytest.raises(TrainingError, match=said):
        train(run_in(data, out), device="cpu", progress=False)


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


@pytest.mark.parametrize(
    ("words", "memory"),
    [
        ("could not create a primitive", True),
        ("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 bytes", True),
        ("std::bad_alloc", True),
        # What oneDNN cannot do at all, with however much memory.
        ("could not create a primitive descriptor for the matmul primitive. Run workload", False),
    ],
)
def test_which_words_of_torch_are_of_memory(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, memory: bool
) -> None:
    def loss(*_: Any) -> torch.Tensor:
        raise RuntimeError(words)

    monkeypatch.setattr(TrainingModule, "loss", loss)
    kind, said = (TrainingError, "out of memory on cpu") if memory else (RuntimeError, words[:20])
    with pytest.raises(kind, match=said):
        train(run_in(data, tmp_path / "out"), device="cpu", progress=False)


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


def test_a_finished_run_is_not_repeated(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(finished, tmp_path / "copy")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert main(command(data, out)) == 0
    shown = capsys.readouterr()
    assert "validation accuracy 1.0000" in shown.out
    assert "checkpoint is of a finished run, and nothing was trained; to train" in shown.err
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


def test_what_was_stored_since_survives_the_same_command(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(finished, tmp_path / "copy")
    given = ["--licence", "CC-BY-4.0", "--mpp", "0.25", "--about", "Two colours"]
    assert main([*command(data, out), *given]) == 0
    place = out / "checkpoint"
    store_temperature(load_checkpoint(place), 1.5)
    (place / OOD_FILE).write_bytes(b"a detector")
    card = (place / "README.md").read_text()
    (place / "README.md").write_text(card + "\nBy hand.\n")
    before = {path: path.read_bytes() for path in place.iterdir()}

    assert main(command(data, out)) == 0
    assert {path: path.read_bytes() for path in place.iterdir()} == before
    assert main([*command(data, out), "--licence", "MIT"]) == 0
    config = load_checkpoint(place).config
    assert (config.licence, config.mpp, config.training_data) == ("MIT", 0.25, "Two colours")
    assert config.temperature == 1.5
    changed = {path.name for path, was in before.items() if path.read_bytes() != was}
    assert changed == {"config.json", "README.md"}
    expected = card.replace("- Licence: CC-BY-4.0", "- Licence: MIT") + "\nBy hand.\n"
    assert (place / "README.md").read_text() == expected


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
        (
            {"classes": ("stain", "blood")},
            r"classes \['blood', 'stain'\] and not \['stain', 'blood'\]",
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
