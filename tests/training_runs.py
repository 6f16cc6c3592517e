"""Small training runs on the CPU, and what tests ask of them."""

from __future__ import annotations

import csv
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mambamic.checkpoint import load_checkpoint
from mambamic.cli import main
from mambamic.preprocess import Preprocess
from mambamic.training.recipe import Recipe
from mambamic.training.run import Run

SIZE = 32
COLOURS = {"blood": (200, 60, 60), "stain": (90, 60, 200)}
RECIPE = Recipe(epochs=6, warmup_epochs=1, batch_size=4, ema_decay=0.5)
SETTINGS = ["--epochs", "6", "--warmup-epochs", "1", "--batch-size", "4", "--ema-decay", "0.5"]


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Small operations: where cores are shared, threads wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_two_colours(root: Path) -> Path:
    """Two classes that differ in colour: eight images to train on, six to validate."""
    random = np.random.default_rng(0)
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


def run_to_the_end(data: Path, out: Path) -> Path:
    """The folder of a run that nothing stopped, in this process: it has imported Lightning."""
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()) as complaints:
        status = main(command(data, out))
    assert (status, complaints.getvalue()) == (0, "")
    stdout = said.getvalue()
    assert stdout.startswith(f"{out / 'checkpoint'}: validation accuracy 1.0000 (epoch ")
    assert len(stdout.splitlines()) == 1
    return out


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


def measured(out: Path) -> dict[str, Any]:
    """What the result says of itself, apart from how long it took."""
    metrics = load_checkpoint(out / "checkpoint").config.metrics
    return {k: v for k, v in metrics.items() if k not in ("minutes", "images_per_second")}
