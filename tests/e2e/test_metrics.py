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
from prometheus_client.parser import text_string_to_metric_families as parse

from mambamic import Classifier, metrics
from mambamic.checkpoint import load_checkpoint
from mambamic.export.archive import write_archive
from mambamic.ood import fit_detector, store_detector

from ..random_checkpoint import write_random_checkpoint
from ..turns import alone
from .prometheus import SCRAPE_S, Prometheus, prometheus
from .servers import (
    ROOT,
    RunningServer,
    end_all,
    end_group,
    environment,
    free_port,
    of_state,
    plain_torchserve,
    post,
    serve,
    wait_for,
)

LOAD_S = 9.0
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


def exposed(port: int) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Every sample of a port, by name and labels."""
    reply = urllib3.request("GET", f"http://127.0.0.1:{port}/metrics", retries=False, timeout=30)
    assert reply.status == 200
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in parse(reply.data.decode()):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def total(port: int, metric: metrics.Metric, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    samples = exposed(port).get(metric.sample, {})
    return sum(value for stated, value in samples.items() if labels.items() <= dict(stated).items())


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
def test_the_number_of_files_is_bounded_and_no_count_is_lost(
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
    assert of_state(state) == []


def test_the_exporter_ends_with_java_and_its_port_is_free_again(
    quick_checkpoint: Path, state: Path
) -> None:
    with serve(state, str(quick_checkpoint), "--device", "cpu") as server:
        record = server.folder.read()
        assert record is not None
        assert f"http://127.0.0.1:{server.port + 3}/metrics" in server.printed
        os.kill(record.pid, signal.SIGKILL)
        pids = {process.pid for process in of_state(state)}
        assert record.exporter in pids
        with serve(state, str(quick_checkpoint), "--device", "cpu", port=server.port) as again:
            assert total(again.port + 3, metrics.WORKER_STARTS) == 1
            assert record.exporter not in {process.pid for process in of_state(state)}
    assert of_state(state) == []


def test_in_the_foreground_a_killed_exporter_comes_back_with_all_counts(
    quick_checkpoint: Path, state: Path
) -> None:
    port = free_port()
    command = [sys.executable, "-m", "mambamic", "serve", "--foreground", "--port", str(port)]
    command += ["--model", str(quick_checkpoint), "--device", "cpu"]
    log = state / "console.txt"
    with log.open("wb") as console:
        process = subprocess.Popen(
            command,
            stdout=console,
            stderr=console,
            cwd=ROOT,
            env=environment(state),
            start_new_session=True,
        )
    try:
        assert wait_for(lambda: b"first answer after" in log.read_bytes(), 120), log.read_text()

        def exporters() -> list[int]:
            found = of_state(state)
            return [one.pid for one in found if "mambamic.launcher.exporter" in one.cmdline()]

        (victim,) = exporters()
        os.kill(victim, signal.SIGKILL)

        def back() -> bool:
            try:
                return total(port + 3, metrics.PREDICTIONS) == 1
            except urllib3.exceptions.HTTPError:
                return False

        assert wait_for(back, 30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert of_state(state) == []
    finally:
        end_group(process)
        end_all(state)


def test_under_plain_torchserve_a_worker_exports_and_another_takes_over(
    quick_checkpoint: Path, state: Path, cell: bytes
) -> None:
    archive = write_archive(quick_checkpoint, state / "store" / "mambamic.mar", workers=2)
    metrics_port = free_port() + 3
    with plain_torchserve(archive, state, metrics_port) as port:
        url = f"http://127.0.0.1:{port}/predictions/mambamic"
        kind = {"Content-Type": "image/png"}

        def answers() -> bool:
            try:
                return post(url, body=cell, headers=kind).status == 200
            except urllib3.exceptions.HTTPError:
                return False

        def starts() -> float:
            try:
                return total(metrics_port, metrics.WORKER_STARTS)
            except urllib3.exceptions.HTTPError:
                return 0

        assert wait_for(answers, 60)
        assert wait_for(lambda: starts() == 2, 60)
        before = total(metrics_port, metrics.PREDICTIONS)
        assert before == 1
        (exporter,) = (
            process
            for process in of_state(state)
            if any(at.laddr.port == metrics_port for at in process.net_connections("tcp"))
        )
        os.kill(exporter.pid, signal.SIGKILL)
        assert wait_for(lambda: starts() == 3, 60)
        assert total(metrics_port, metrics.PREDICTIONS) == before
