"""What a server counts, as a real Prometheus scrapes it; under load, and when workers die."""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import urllib3

from mambamic import Classifier, metrics
from mambamic.checkpoint import load_checkpoint
from mambamic.ood import fit_detector, store_detector

from ..random_checkpoint import write_random_checkpoint
from ..turns import alone
from .counts import exposed, total
from .prometheus import SCRAPE_S, Prometheus, prometheus
from .servers import (
    ROOT,
    RunningServer,
    of_state,
    serve,
    wait_for,
)

LOAD_S = 6.0
CLIENTS = 4
FILES_PER_WORKER = 6  # five of metrics and a lock


@dataclass
class Generator:
    """Clients that send cells, now and then something else, each with an edge's stamp.

    Args:
        server: That answers.
        cell: An image.
        seconds: For which it sends.
        durations: Of the answers, in seconds, as a client sees them.
        images: That were classified.
        failed: Requests that were not answered with 200.
    """

    server: RunningServer
    cell: bytes
    seconds: float
    durations: list[float] = field(default_factory=list)
    images: int = 0
    failed: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        threads = [threading.Thread(target=self._client, args=(seed,)) for seed in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(self.seconds + 90)
            assert not thread.is_alive()

    def _client(self, seed: int) -> None:
        chance = random.Random(seed)
        end = time.monotonic() + self.seconds
        pool = urllib3.PoolManager(retries=False, timeout=60)
        url = f"http://127.0.0.1:{self.server.port}/predictions/mambamic"
        while time.monotonic() < end:
            # Between one and six at once: a batch is not always the same.
            tiles = 1 if chance.random() < 0.9 else chance.randint(2, 6)
            data = self.cell if chance.random() < 0.95 else self.cell[:99]
            fields = [(f"t{number}", ("tile", data, "image/png")) for number in range(tiles)]
            began = time.monotonic()
            stamp = {"x-reQuest-start": f"t={time.time():.3f}"}
            status = pool.request("POST", url, fields=fields, headers=stamp).status
            with self._lock:
                self.durations.append(time.monotonic() - began)
                self.images += tiles if status == 200 else 0
                self.failed += status != 200


@dataclass(frozen=True)
class Monitored:
    """A server after a load, and the Prometheus that saw it."""

    server: RunningServer
    prometheus: Prometheus
    load: Generator
    began: float


@pytest.fixture(scope="module")
def checkpoint_with_detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, and a detector that was fitted to noise."""
    folder = write_random_checkpoint(tmp_path_factory.mktemp("metrics") / "random", input_size=64)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), np.uint8)
    embeddings = Classifier.load(folder, device="cpu").embeddings(noise)
    store_detector(load_checkpoint(folder), fit_detector(embeddings, np.arange(64) % 8))
    return folder


@pytest.fixture(scope="module")
def monitored(checkpoint_with_detector: Path, cell: bytes) -> Iterator[Monitored]:
    with (
        tempfile.TemporaryDirectory(prefix="mambamic-test-") as folder,
        serve(Path(folder), str(checkpoint_with_detector), "--device", "cpu") as server,
        prometheus(server, Path(folder) / "prometheus") as running,
    ):
        load = Generator(server, cell, LOAD_S)
        began = time.time()
        with alone():
            load.run()
        time.sleep(3 * SCRAPE_S)
        yield Monitored(server, running, load, began)


@pytest.fixture
def render(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "monitoring"))
    return importlib.import_module("render")


def test_every_metric_is_given_and_no_other(monitored: Monitored) -> None:
    names = set(exposed(monitored.server.port + 3))
    for metric in metrics.ALL:
        expected = f"{metric.name}_count" if metric.kind == "histogram" else metric.sample
        # There is no GPU in this server.
        assert (expected in names) == ("gpu" not in metric.name), expected
    known = {metric.sample for metric in metrics.ALL}
    given = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
             for name in names}  # fmt: skip
    assert given <= known


def test_what_was_sent_was_counted(monitored: Monitored) -> None:
    port, load = monitored.server.port + 3, monitored.load
    assert load.failed > 0
    assert total(port, metrics.ANSWERS, status="400") == load.failed
    # The launcher sends one image of its own.
    assert total(port, metrics.ANSWERS, status="200") == len(load.durations) - load.failed + 1
    assert total(port, metrics.PREDICTIONS) == load.images + 1
    assert total(port, metrics.ERRORS, reason="decode_failed") >= load.failed
    assert total(port, metrics.IN_FLIGHT) == 0
    assert total(port, metrics.INFO, device="cpu", architecture="mambamic_t") == 1
    # The cell is a drawing, and what the detector knows is noise.
    assert 0 < total(port, metrics.OUT_OF_DISTRIBUTION) <= load.images + 1


def test_the_p99_of_prometheus_is_that_of_the_clients(monitored: Monitored) -> None:
    name = metrics.REQUEST_DURATION.name
    seen = monitored.prometheus.value(f"histogram_quantile(0.99, sum by (le) ({name}_bucket))")
    counted = monitored.prometheus.value(f"sum({name}_count)")
    assert counted == len(monitored.load.durations)
    theirs = float(np.quantile(monitored.load.durations, 0.99, method="higher"))
    print(f"p99 of {counted:.0f} requests: {seen:.4f} s in Prometheus, {theirs:.4f} s at clients")
    bounds = metrics.SECONDS
    assert abs(bisect_left(bounds, seen) - bisect_left(bounds, theirs)) <= 1


def test_queue_wait_and_handler_make_up_the_whole(monitored: Monitored) -> None:
    def total_of(metric: metrics.Metric) -> float:
        return monitored.prometheus.value(f"sum({metric.name}_sum)")

    whole = total_of(metrics.REQUEST_DURATION)
    parts = total_of(metrics.QUEUE_WAIT) + total_of(metrics.HANDLER_DURATION)
    # The launcher's image has no stamp, and is in the handler's time alone.
    assert whole <= parts < whole + 2


def test_every_panel_of_the_dashboard_has_data(monitored: Monitored, render: ModuleType) -> None:
    board = json.loads(render.BOARD.read_text(encoding="utf-8"))
    span = render.Span(monitored.began, time.time(), SCRAPE_S)
    panels = render.panels(board)
    assert len(panels) >= 15
    for panel in panels:
        for target in panel["targets"]:
            series = render.answer(monitored.prometheus.url, target, span, 4 * SCRAPE_S)
            values = [
                float(value) for one in series for _, value in one.get("values", [one.get("value")])
            ]
            assert any(map(math.isfinite, values)), (panel["title"], target["expr"])


def test_the_dashboard_can_be_drawn(
    monitored: Monitored, render: ModuleType, tmp_path: Path
) -> None:
    out = tmp_path / "dashboard.png"
    command = [sys.executable, str(ROOT / "monitoring" / "render.py")]
    command += [monitored.prometheus.url, str(out), "--minutes", "1", "--scrape", str(SCRAPE_S)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"\x89PNG")


def test_every_rule_can_be_evaluated(monitored: Monitored) -> None:
    groups = monitored.prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}, rules
    firing = {rule["name"] for rule in rules if rule.get("state") == "firing"}
    assert firing == set()
    for rule in rules:
        if rule["type"] == "recording":
            assert monitored.prometheus.get("query", query=rule["name"])["result"], rule["name"]


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.soak)])
def test_files_are_bounded_no_count_is_lost_and_the_exporter_ends_with_java(
    quick_checkpoint: Path, state: Path, cell: bytes, kills: int
) -> None:
    with serve(state, str(quick_checkpoint), "--device", "cpu") as server:
        port, folder = server.port + 3, server.folder.metrics
        most = 0

        def replaced(old: int) -> bool:
            # Without asking the worker, who may be the dead one.
            url = f"http://127.0.0.1:{server.port + 1}/models/mambamic"
            ((worker,),) = (
                model["workers"] for model in urllib3.request("GET", url, retries=False).json()
            )
            return bool(worker["status"] == "READY" and int(worker["pid"]) != old)

        for number in range(kills):
            assert {server.body(cell).status for _ in range(5)} == {200}
            (victim,) = server.worker_pids()
            os.kill(victim, signal.SIGKILL)
            # Not before: the frontend would hand the request to the dead one.
            assert wait_for(partial(replaced, victim), 120), number
            assert server.body(cell).status == 200
            assert total(port, metrics.PREDICTIONS) == 1 + 6 * (number + 1)
            assert total(port, metrics.IN_FLIGHT) == 0
            most = max(most, len(list(folder.iterdir())))
        print(f"{kills} kills: at most {most} files")
        # Of the workers that live, what the dead ones counted, and the lock of the merging.
        assert most <= FILES_PER_WORKER + 3
        assert total(port, metrics.WORKER_STARTS) == kills + 1

        # Its port is free again when Java has died.
        record = server.folder.read()
        assert record is not None
        assert f"http://127.0.0.1:{port}/metrics" in server.printed
        os.kill(record.pid, signal.SIGKILL)
        assert record.exporter in {process.pid for process in of_state(state)}
        with serve(state, str(quick_checkpoint), "--device", "cpu", port=server.port):
            assert total(port, metrics.WORKER_STARTS) == 1
            assert record.exporter not in {process.pid for process in of_state(state)}
    assert of_state(state) == []
