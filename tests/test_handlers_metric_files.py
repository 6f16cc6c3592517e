from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.mmap_dict import MmapedDict

from mambamic.errors import UsageError
from mambamic.handlers import metric_files
from mambamic.handlers.metric_files import MetricFolder

# A worker: it counts as many as it is told, line by line, until it is killed.
WORKER = """
import sys
from mambamic.handlers import metric_files

folder = metric_files.join()
from prometheus_client import Counter, Gauge, Histogram

assert folder is not None
counter = Counter("counted", "Help", ["kind"])
histogram = Histogram("took", "Help", buckets=(1, 2))
held = Gauge("held", "Help", multiprocess_mode="livesum")
held.set(1)
print("ready", flush=True)
for line in sys.stdin:
    counter.labels("line").inc(int(line))
    histogram.observe(int(line))
    print("counted", flush=True)
"""


class Worker:
    """A process that counts."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PROMETHEUS_MULTIPROC_DIR": str(folder),
                "MAMBAMIC_METRICS_PORT": "0",
            },
        )
        self._expect("ready")

    def _expect(self, said: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{said}\n"

    def count(self, number: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        self._expect("counted")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@contextmanager
def workers(folder: Path, number: int) -> Iterator[list[Worker]]:
    started: list[Worker] = []
    try:
        started.extend(Worker(folder) for _ in range(number))
        yield started
    finally:
        for worker in started:
            worker.kill()


def values(folder: MetricFolder) -> dict[str, float]:
    return {
        sample.name + str(sample.labels.get("le", "")): sample.value
        for metric in folder.collect()
        for sample in metric.samples
    }


def test_what_the_dead_have_counted_stays_and_their_files_do_not(tmp_path: Path) -> None:
    folder = MetricFolder(tmp_path)
    with workers(tmp_path, 3) as (first, second, third):
        for worker, number in ((first, 1), (second, 2), (third, 3)):
            worker.count(number)
        assert values(folder)["held"] == 3
        first.kill()
        second.kill()
        seen = values(folder)
        assert (seen["counted_total"], seen["held"]) == (6, 1)
        assert (seen["took_bucket1.0"], seen["took_bucket2.0"]) == (1, 2)
        assert (seen["took_bucket+Inf"], seen["took_count"], seen["took_sum"]) == (3, 3, 6)
        alive = {path.name for path in tmp_path.glob(f"*_{third.process.pid}.db")}
        assert {path.name for path in tmp_path.glob("*.db")} == alive | {
            "counter_merged.db",
            "histogram_merged.db",
        }
        third.count(10)
        third.kill()
        # Added to what was merged before.
        assert values(folder)["counted_total"] == 16
        assert values(folder)["counted_total"] == 16
    assert "held" not in values(folder)
    assert {path.name for path in tmp_path.iterdir()} == {
        "counter_merged.db",
        "histogram_merged.db",
        "merge.lock",
    }


@pytest.mark.parametrize("step", ["replace", "unlink"])
@pytest.mark.parametrize("number", range(5))
def test_an_exporter_that_is_killed_in_the_midst_of_merging_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    folder = MetricFolder(tmp_path)
    with workers(tmp_path, 2) as (first, second):
        first.count(5)
        first.kill()
        folder.sweep()
        second.count(7)
        second.kill()
    calls = 0
    whole: Callable[..., object] = getattr(Path, step)

    def killed(path: Path, *arguments: object, **named: object) -> object:
        nonlocal calls
        if calls == number:
            raise KeyboardInterrupt
        calls += 1
        return whole(path, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, step, killed)
        try:
            folder.sweep()
        except KeyboardInterrupt:
            calls = -1
    # Of replacements there are three: the journal and two kinds.
    assert (calls == -1) == (number < 3 or step == "unlink")
    assert values(MetricFolder(tmp_path))["counted_total"] == 12
    assert len(list(tmp_path.glob("*.db"))) == 2


def test_a_worker_with_the_number_of_a_dead_one_carries_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with workers(tmp_path, 1) as (dead,):
        dead.count(4)
        dead.kill()
    monkeypatch.setattr(os, "getpid", lambda: dead.process.pid)
    folder = MetricFolder(tmp_path)
    folder.register()
    seen = values(folder)
    assert seen["counted_total"] == 4
    assert "held" not in seen  # what the dead one held is gone
    assert (tmp_path / f"counter_{dead.process.pid}.db").exists()
    folder.unregister()


def full(*ignored: object) -> None:
    raise OSError(28, "No space left on device")


def test_where_there_is_no_space_a_worker_serves_without_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert metric_files.join() is None
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ
    assert "No space left" in caplog.text
    # What it leaves behind stops nobody from collecting.
    assert list(tmp_path.glob("*.db")) == []
    assert values(MetricFolder(tmp_path)) == {}


def test_where_there_is_no_space_nothing_is_merged_and_nothing_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = MetricFolder(tmp_path)
    with workers(tmp_path, 1) as (dead,):
        dead.count(4)
        dead.kill()
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert values(folder)["counted_total"] == 4
        assert not (tmp_path / "counter_merged.db").exists()
    assert values(folder)["counted_total"] == 4
    assert (tmp_path / "counter_merged.db").exists()


def test_files_that_a_full_disk_cut_short_are_cleared_away(tmp_path: Path) -> None:
    folder = MetricFolder(tmp_path)
    with workers(tmp_path, 1) as (dead,):
        dead.count(4)
        dead.kill()
    for kind in ("counter", "histogram", "gauge_livesum"):
        (tmp_path / f"{kind}_{2**22 + 1}.db").touch()
    assert values(folder)["counted_total"] == 4
    assert {path.name for path in tmp_path.glob("*.db")} == {
        "counter_merged.db",
        "histogram_merged.db",
    }


def test_what_goes_wrong_in_a_sweep_is_said_once_and_does_not_end_the_exporter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = MetricFolder(tmp_path)
    broken = tmp_path / f"counter_{2**22 + 1}.db"
    # Its head counts 64 bytes as used, and the first key goes past them.
    content = struct.pack("iii", 64, 0, 1000).ljust(64, b"\0")
    broken.write_bytes(content)
    folder.tend()
    folder.tend()
    assert broken.exists()
    assert caplog.text.count("could not be merged") == 1
    broken.unlink()
    folder.tend()
    broken.write_bytes(content)
    folder.tend()
    assert caplog.text.count("could not be merged") == 2


def test_a_merged_file_is_no_larger_than_it_has_to_be(tmp_path: Path) -> None:
    folder = MetricFolder(tmp_path)
    for pid in (2**22 + 1, 2**22 + 2):
        file = MmapedDict(str(tmp_path / f"counter_{pid}.db"))
        for number in range(100):
            file.write_value(json.dumps(["many", "many_total", {"n": str(number)}, "é"]), 1, 0)
        file.close()
    folder.sweep()
    assert (tmp_path / "counter_merged.db").stat().st_size < 2**15
    (metric,) = folder.collect()
    assert [sample.value for sample in metric.samples] == [2] * 100


@pytest.mark.parametrize("stated", ["", "metrics", "65536", "-1", "8083.5"])
def test_a_port_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, stated: str) -> None:
    monkeypatch.setenv("MAMBAMIC_METRICS_PORT", stated)
    with pytest.raises(UsageError, match=f"MAMBAMIC_METRICS_PORT='{stated}'"):
        metric_files.join()


def test_by_default_nothing_is_exported_where_the_port_is_0() -> None:
    assert os.environ["MAMBAMIC_METRICS_PORT"] == "0"
    assert metric_files.join() is None
