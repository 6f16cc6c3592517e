"""Locust's scenarios against a real server behind a real edge; a soak at twice what it can take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from loadtest.images import cells
from mambamic import Classifier, Prediction, __version__
from mambamic.bundles import Limits
from mambamic.client import Client
from mambamic.images import decode

from .edges import RunningEdge, edge
from .servers import ROOT, RunningServer, environment, of_state, serve

MINUTES = float(os.environ.get("MAMBAMIC_SOAK_MINUTES", "10"))
# Twice what a server can take is asked for by so many, so that nobody waits for anybody's answer.
CROWD = 64


@pytest.fixture(scope="module")
def behind(checkpoint: Path) -> Iterator[tuple[RunningServer, RunningEdge]]:
    """The demo checkpoint behind an edge with its defaults."""
    with (
        tempfile.TemporaryDirectory(prefix="mambamic-test-") as folder,
        serve(Path(folder), str(checkpoint), "--device", "cpu") as server,
        edge(Path(folder), ports=[server.port]) as front,
    ):
        yield server, front


def load(
    front: RunningServer, scenario: str, seconds: float, out: Path, users: int, rate: float = 0
) -> dict[str, Any]:
    """Run a scenario, as ``make loadtest`` does, and return what it saw."""
    done = subprocess.run(
        [
            *("make", "--no-print-directory", "loadtest", f"URL=http://127.0.0.1:{front.port}"),
            *(f"SCENARIO={scenario}", f"USERS={users}", f"SECONDS={seconds:.0f}"),
            *(f"RATE={rate}", f"REPORTS={out}", f"BIN={Path(sys.executable).parent}"),
            # What make would install is there: these tests run in it.
            *(f"--assume-old={sys.prefix}/.dev", f"VENV={sys.prefix}"),
        ],
        cwd=ROOT, env=environment(front.state), capture_output=True, text=True,
        timeout=seconds + 240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "<html" in (out / f"{scenario}.html").read_text()[:200].lower()
    assert "Request Count" in (out / f"{scenario}_stats.csv").read_text()
    found: dict[str, Any] = json.loads((out / f"{scenario}.json").read_text())
    print(scenario, json.dumps(found))
    return found


@pytest.mark.parametrize(
    ("scenario", "rate"), [("SingleCells", 6), ("Bursts", 0), ("SlowClients", 0)]
)
def test_a_scenario(
    behind: tuple[RunningServer, RunningEdge], scenario: str, rate: float, tmp_path: Path
) -> None:
    found = load(behind[1], scenario, 4, tmp_path, users=3, rate=rate)
    # Three at a time are within what the edge admits.
    assert set(found["statuses"]) == {"200"}
    assert found["faults"] == {}


def test_wrong_answers_are_told(behind: tuple[RunningServer, RunningEdge], tmp_path: Path) -> None:
    """A run fails where the server does not do what it should: here it has no such model."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--headless"),
            *("--host", f"http://127.0.0.1:{behind[1].port}", "-u", "2", "-t", "2s"),
            *("--model", "nosuch", "--record", str(tmp_path / "record.json"), "SingleCells"),
        ],
        cwd=ROOT, env={**environment(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    found = json.loads((tmp_path / "record.json").read_text())
    # A fast machine asks for more than the edge admits: 429 is no fault.
    assert set(found["statuses"]) <= {"404", "429"}
    assert found["faults"] == {"404 to a good image": found["statuses"]["404"]}


def resources(state: Path) -> dict[str, int]:
    """Memory and open files of all the site's processes."""
    processes = of_state(state)
    return {
        "rss_mb": sum(process.memory_info().rss for process in processes) // 2**20,
        "files": sum(process.num_fds() for process in processes),
    }


def sustained(front: RunningEdge, seconds: float, out: Path) -> float:
    """How many requests a second are answered to who sends the next one when the last is done."""
    found = load(front, "Mixed", seconds, out, users=3)
    return float(found["requests"] / found["seconds"])


def overload(
    behind: tuple[RunningServer, RunningEdge], seconds: float, out: Path
) -> dict[str, Any]:
    """Load with what is sustained, with half of it, then with twice."""
    server, front = behind
    rate = sustained(front, seconds / 3, out)
    half = load(front, "Mixed", seconds / 3, out, users=CROWD // 4, rate=rate / 2)
    before = resources(server.state)
    twice = load(front, "Mixed", seconds, out, users=CROWD, rate=rate * 2)
    return {
        "sustained_per_second": round(rate, 1),
        "half": half,
        "twice": twice,
        "p99_ratio": round(twice["p99_s"] / half["p99_s"], 2),
        "before": before,
        "after": resources(server.state),
    }


def predictions_are_right(front: RunningEdge, classifier: Classifier) -> bool:
    """Whether the server, after all this, predicts as the library does."""
    sent = [cell.content for cell in cells(8, seed=99)]
    expected = classifier.predict([decode(content) for content in sent])
    with Client(f"http://127.0.0.1:{front.port}", limits=Limits(tiles=1)) as client:
        found = client.predict(sent)
    return all(
        isinstance(one, Prediction)
        and one.label == other.label
        and abs(one.probability - other.probability) < 1e-4
        for one, other in zip(found, expected, strict=True)
    )


def test_twice_the_load_for_seconds(
    behind: tuple[RunningServer, RunningEdge], classifier: Classifier, tmp_path: Path
) -> None:
    rate = sustained(behind[1], 3, tmp_path)
    twice = load(behind[1], "Mixed", 9, tmp_path, users=CROWD, rate=rate * 2)
    statuses = twice["statuses"]
    assert twice["faults"] == {}
    assert statuses["429"] > 0, "it was no overload"
    assert statuses["200"] > 0
    assert predictions_are_right(behind[1], classifier)


@pytest.mark.soak
def test_twice_the_load(
    behind: tuple[RunningServer, RunningEdge], classifier: Classifier, tmp_path: Path
) -> None:
    found = overload(behind, 60 * MINUTES, tmp_path)
    day = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    record = {"mambamic": __version__, "minutes": MINUTES, **found}
    out = ROOT / "benchmarks" / "results" / f"overload_{day}.json"
    out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    assert found["twice"]["faults"] == found["half"]["faults"] == {}
    assert found["twice"]["statuses"]["429"] > 0
    assert found["p99_ratio"] < 3
    assert found["after"]["rss_mb"] <= found["before"]["rss_mb"] * 1.2 + 50
    assert found["after"]["files"] <= found["before"]["files"] * 1.2 + 20
    assert predictions_are_right(behind[1], classifier)
