"""A server with its defaults on a real GPU: start, answers, and a killed worker."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mambamic import Classifier
from mambamic.images import decode

from .servers import Load, RunningServer, serve, wait_for

pytestmark = pytest.mark.gpu
IMAGES = 300
CLIENTS = 64
BATCH = 32
CLOSE = 5e-3  # between batches of other sizes, in float16


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[RunningServer]:
    """What ``mambamic serve`` starts where there is a GPU."""
    with (
        tempfile.TemporaryDirectory(prefix="mambamic-test-") as folder,
        serve(Path(folder), str(checkpoint)) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def cells(data_dir: Path) -> list[bytes]:
    """Real cells, as files."""
    with zipfile.ZipFile(data_dir / "pbc200" / "val.zip") as archive:
        names = sorted(name for name in archive.namelist() if not name.endswith("/"))
        return [archive.read(name) for name in names[:: len(names) // IMAGES][:IMAGES]]


def test_the_first_answer_comes_soon(server: RunningServer) -> None:
    found = re.search(r"first answer after ([\d.]+) s", server.printed)
    assert found is not None, server.printed
    print(found[0])
    assert float(found[1]) < 20
    described = server.describe()
    assert described["batchSize"] == BATCH
    assert described["customizedMetadata"]["device"].startswith("cuda")


def test_the_answers_are_those_of_the_library(
    server: RunningServer, checkpoint: Path, cells: list[bytes]
) -> None:
    expected = Classifier.load(checkpoint, device="cuda").predict([decode(cell) for cell in cells])
    worst = 0.0
    for start in range(0, IMAGES, CLIENTS):
        part = cells[start : start + CLIENTS]
        with Load(server, part, clients=len(part), requests=5) as load:
            load.wait()
        assert len(load.of_image) == 5 * len(part)
        for image, answer in load.of_image:
            assert answer.status == 200, answer.body
            wanted = expected[start + image].probabilities
            got = answer.json["probabilities"]
            worst = max(worst, *(abs(got[name] - wanted[name]) for name in wanted))
            second, first = sorted(wanted.values())[-2:]
            label = expected[start + image].label
            assert answer.json["label"] == label or first - second < 2 * CLOSE
    print(f"largest difference of a probability: {worst:.1e}")
    assert worst < CLOSE


def test_a_killed_worker_costs_what_was_in_flight(
    server: RunningServer, cells: list[bytes]
) -> None:
    before = server.worker_pids()
    assert len(before) == 2, "two for each GPU"
    with Load(server, cells, clients=CLIENTS, requests=200) as load:
        assert wait_for(lambda: len(load.answers) >= 10 * CLIENTS, 60)
        os.kill(before[0], signal.SIGKILL)
        killed = time.monotonic()
        load.wait()
    lost = [answer for _, _, answer in load.answers if answer.status != 200]
    assert len(load.answers) == 200 * CLIENTS
    assert 0 < len(lost) <= BATCH, [answer.body for answer in lost]
    after = sorted(end for _, end, answer in load.answers if answer.status == 200 and end > killed)
    gap = max(later - earlier for earlier, later in zip([killed, *after], after, strict=False))
    assert wait_for(lambda: len(set(server.worker_pids()) - set(before)) == 1, 30)
    back = time.monotonic() - killed
    rate = len(load.answers) / (load.answers[-1][1] - load.answers[0][0])
    print(f"{len(lost)} lost; {gap:.2f} s without an answer; a new worker within {back:.1f} s")
    print(f"{rate:.0f} requests/s, from a client in Python")
    assert gap < 10
