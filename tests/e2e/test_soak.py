"""The long version: an hour's mischief in ten minutes, and whether anything grows."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest

from mambamic import __version__

from .servers import ROOT, Answer, RunningServer, of_state, serve

pytestmark = pytest.mark.soak

MINUTES = float(os.environ.get("MAMBAMIC_SOAK_MINUTES", "10"))
CLIENTS = 32
KILL_EVERY = 60.0  # seconds
BATCH = 8


class Client(threading.Thread):
    """Sends good, bad and several images in turn until the end, and counts the answers."""

    def __init__(self, server: RunningServer, cell: bytes, bad: list[bytes], end: float) -> None:
        super().__init__()
        self.server, self.cell, self.bad, self.end = server, cell, bad, end
        self.statuses: dict[int, int] = {}
        self.slowest = 0.0

    def run(self) -> None:
        turn = 0
        while time.monotonic() < self.end:
            answer = self.request(turn)
            turn += 1
            self.statuses[answer.status] = self.statuses.get(answer.status, 0) + 1
            self.slowest = max(self.slowest, answer.seconds)
            if answer.status not in (200, 500, 507):  # a killed worker's requests get the latter
                assert 400 <= answer.status < 500
                assert "message" in answer.json["error"]

    def request(self, turn: int) -> Answer:
        if turn % 5 == 3:
            return self.server.body(self.bad[turn % len(self.bad)])
        if turn % 5 == 4:
            mixed = [self.cell, self.bad[turn % len(self.bad)], self.cell]
            return self.server.form(*((f"t{i}", d, "image/png") for i, d in enumerate(mixed)))
        return self.server.body(self.cell)


def resources(state: Path) -> dict[str, int]:
    """Memory and open files of the server's processes, workers and Java together."""
    processes = of_state(state)
    return {
        "processes": len(processes),
        "rss_mb": sum(process.memory_info().rss for process in processes) // 2**20,
        "files": sum(process.num_fds() for process in processes),
        "threads": sum(process.num_threads() for process in processes),
    }


def test_nothing_is_lost_and_nothing_grows(
    quick_checkpoint: Path, state: Path, cell: bytes, data_dir: Path
) -> None:
    bad = [path.read_bytes() for path in sorted((data_dir / "odd_images").iterdir())]
    with serve(state, str(quick_checkpoint), "--device", "cpu") as server:
        began = time.monotonic()
        clients = [Client(server, cell, bad, began + 60 * MINUTES) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        kills, samples = 0, []
        while any(client.is_alive() for client in clients):
            time.sleep(KILL_EVERY / 2)
            samples.append(resources(state))
            if time.monotonic() < began + 60 * MINUTES - KILL_EVERY / 2:
                for pid in server.worker_pids():
                    os.kill(pid, signal.SIGKILL)
                    kills += 1
            time.sleep(KILL_EVERY / 2)
        for client in clients:
            client.join()
        assert server.body(cell).status == 200
    statuses: dict[int, int] = {}
    for client in clients:
        for status, count in client.statuses.items():
            statuses[status] = statuses.get(status, 0) + count
    record = {
        "mambamic": __version__,
        "minutes": MINUTES,
        "clients": CLIENTS,
        "workers_killed": kills,
        "statuses": statuses,
        "slowest_answer_s": round(max(client.slowest for client in clients), 1),
        "first": samples[0],
        "last": samples[-1],
    }
    day = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    out = ROOT / "benchmarks" / "results" / f"soak_{day}.json"
    out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))

    assert kills > 0
    assert statuses.get(0, 0) == 0, "connections were dropped"
    lost = statuses.get(500, 0) + statuses.get(507, 0)
    assert lost <= kills * BATCH, "more was lost than was in flight"
    assert samples[-1]["files"] <= samples[0]["files"] * 1.2 + 20
    assert samples[-1]["rss_mb"] <= samples[0]["rss_mb"] * 1.3 + 100
    assert of_state(state) == []
