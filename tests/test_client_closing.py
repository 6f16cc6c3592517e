"""Stopping while a server is away: what waits to be sent again is given up at once."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mambamic import Classifier
from mambamic.client import Client, Patience
from mambamic.errors import OverloadedError
from mambamic.launcher.probe import draw_cell

from .test_client import Reply, Script, script

__all__ = ["script"]
AWAY = Reply(503, {"code": 503, "type": "ServiceUnavailableException", "message": "Gone."})
SOON = 20  # seconds; patience would be minutes


def wait_until_seen(script: Script, requests: int) -> None:
    deadline = time.monotonic() + 120
    while len(script.seen) < requests:
        assert time.monotonic() < deadline, f"{len(script.seen)} requests came"
        time.sleep(0.02)


def interrupted(script: Script, requests: int, *arguments: str) -> tuple[int, float, str]:
    """Run a command, interrupt it after some requests, and return how it ended and how soon."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mambamic", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until_seen(script, requests)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    return process.returncode, time.monotonic() - began, said


def test_a_closed_client_waits_for_nobody(script: Script) -> None:
    script.replies = [AWAY] * 100
    client = Client(script.url, patience=Patience(overall=600))
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            client.predict([b"a"])
        except OverloadedError as error:
            failures.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until_seen(script, 5)  # the next pause would be of seconds
    began = time.monotonic()
    client.close()
    thread.join(timeout=SOON)
    assert time.monotonic() - began < 1
    assert len(failures) == 1


def test_ctrl_c_ends_a_prediction_by_a_server(script: Script, tmp_path: Path) -> None:
    script.replies = [AWAY] * 100
    (tmp_path / "cell.png").write_bytes(draw_cell())
    called = ["predict", "--server", script.url, "--patience", "600", str(tmp_path / "cell.png")]
    status, took, said = interrupted(script, 3, *called)
    assert (status, "Traceback" in said) == (130, False), said
    assert took < SOON


def test_ctrl_c_ends_a_slide_by_a_server(
    script: Script, random_checkpoint: Path, tmp_path: Path
) -> None:
    with Image.open(io.BytesIO(draw_cell())) as image:
        (known,) = Classifier.load(random_checkpoint, "cpu").predict([image])
    script.replies = [Reply(body=known.as_json()), *[AWAY] * 1000]
    slide = tmp_path / "slide.png"
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(noise).save(slide)
    called = ["score", str(slide), "--model", str(random_checkpoint), "--server", script.url]
    called += ["--tile-px", "--tissue", "none", "--out", str(tmp_path / "out")]
    status, took, said = interrupted(script, 4, *called)
    assert (status, "Traceback" in said) == (130, False), said
    assert took < SOON


@pytest.mark.parametrize("times", [1, 2])
def test_closing_twice_does_no_harm(script: Script, times: int) -> None:
    client = Client(script.url)
    assert len(client.predict([b"a"])) == 1
    for _ in range(times):
        client.close()
