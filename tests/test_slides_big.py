"""Slides of gigapixels: memory that does not grow with them, and the level that is read."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.slide_levels import compare

from .slide_files import blobs, write_slide
from .slide_runs import ROOT, only, summary

MODEL_ALONE = """
import sys, time
from mambamic import Classifier
Classifier.load(sys.argv[1], "cpu").warm_up()
print("ready", flush=True)
time.sleep(60)
"""


def _memory(process: psutil.Process) -> int:
    """Memory of a process and its children, what they share counted once."""
    total = 0
    with contextlib.suppress(psutil.Error):
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += one.memory_full_info().pss
    return total


def _model_alone(checkpoint: Path) -> int:
    command = [sys.executable, "-c", MODEL_ALONE, str(checkpoint)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        used = _memory(psutil.Process(process.pid))
        process.kill()
    return used


def _peak(command: list[str]) -> int:
    peak = 0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, _memory(watched))
            time.sleep(0.1)
    assert process.returncode == 0
    return peak


@pytest.mark.parametrize(
    ("side", "levels", "limit"),
    [
        # Two readers, a finishing process, and their libraries, whatever the slide.
        pytest.param(12_000, 5, 1.2e9, id="small"),
        pytest.param(50_000, 8, 2e9, id="full", marks=pytest.mark.soak),
    ],
)
def test_memory_does_not_grow_with_the_slide(
    side: int, levels: int, limit: float, random_checkpoint: Path, tmp_path: Path
) -> None:
    spots = [(side // 4, side // 3, side // 12), (int(side * 0.7), int(side * 0.6), side // 9)]
    slide = write_slide(tmp_path / "big.tiff", (side, side), levels, blobs(spots))
    alone = _model_alone(random_checkpoint)
    command = [
        sys.executable,
        "-m",
        "mambamic",
        "score",
        str(slide),
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--model", str(random_checkpoint), "--target-mpp", "1", "--tile", "224"]
    peak = _peak([*command, "--workers", "2"])
    said = summary(only(tmp_path / "out"))
    print(
        f"{side} x {side}: {said['tiles']} of {said['plan']['tiles_in_grid']} tiles, "
        f"{(peak - alone) / 1e6:.0f} MB beyond the model's {alone / 1e6:.0f} MB"
    )
    assert said["status"] == "ok"
    assert said["layout"]["level"] == 1
    assert 0 < said["tiles"] < 0.2 * said["plan"]["tiles_in_grid"]
    assert peak - alone < limit


def test_the_best_level_beats_level_0(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "p.tiff", (8192, 4096), 4, blobs([(4096, 2048, 4000)]))
    measured = compare(slide, 8, 8, 3)
    print(measured)
    assert measured["times"] >= 5
