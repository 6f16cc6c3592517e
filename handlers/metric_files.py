"""The files through which workers hand their metrics to whoever exports them.

prometheus-client's multi-process mode gives each process files of its own, memory that it shares
with its reader: nothing is lost when it is killed, but its files stay. Here each worker holds a
lock for as long as it lives, whatever becomes of its process id; the files of those that hold
none are added up into one file per kind of metric, so that there are never many.

Under plain TorchServe there is no launcher to export. Then each worker tries to, and the one that
gets the port does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mambamic.errors import UsageError

if TYPE_CHECKING:
    from prometheus_client import Metric

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client's own
PORT_VARIABLE = "MAMBAMIC_METRICS_PORT"
DEFAULT_PORT = 8083  # the one after TorchServe's own three
SWEEP_S = 1.0
RETRY_S = 1.0

_OF_WORKER = re.compile(r"(counter|histogram|gauge_[a-z]+)_(\d+)\.db")
# A page that has no place on the disk ends its process with a signal when it is written to: the
# place is taken beforehand.
_SIZES = {
    "counter": 1 << 18,
    "histogram": 1 << 20,
    "gauge_livesum": 1 << 16,
    "gauge_livemax": 1 << 16,
    "gauge_livemostrecent": 1 << 16,
}
# How much of a file is used stands at its head.
_HEADER = 8


class MetricFolder:
    """The folder that the workers of one server share with its exporter.

    Args:
        path: An existing folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._journal = path / "merge.journal"
        self._own: IO[str] | None = None
        self._last_failure = ""

    def clear(self) -> None:
        """Remove every file, before a start."""
        for path in self.path.iterdir():
            path.unlink(missing_ok=True)

    def register(self) -> None:
        """Count this process, from now to its end, among the living, and make its files.

        Raises:
            OSError: There is no space for them.
        """
        pid = os.getpid()
        with self._alone():
            # With the number of a process that has died the files of that one are carried on, but
            # what it held is gone.
            for path in self.path.glob(f"gauge_*_{pid}.db"):
                path.unlink()
            self._own = self._lock(pid).open("a")
            fcntl.flock(self._own, fcntl.LOCK_EX)
            try:
                for kind, size in _SIZES.items():
                    _take_space(self.path / f"{kind}_{pid}.db", size)
            except OSError:
                self.unregister()
                raise

    def unregister(self) -> None:
        """Undo `register`."""
        if self._own is not None:
            self._own.close()
            self._own = None

    def sweep(self) -> None:
        """Add up what dead workers have counted, and remove their files."""
        with self._alone():
            self._sweep()

    def tend(self) -> None:
        """Sweep, and log what goes wrong, once: the next time may do better."""
        try:
            self.sweep()
            self._last_failure = ""
        except Exception as error:
            if repr(error) != self._last_failure:
                logger.exception("the metrics of dead workers could not be merged")
            self._last_failure = repr(error)

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of all workers, dead and living, as one."""
        from prometheus_client.multiprocess import MultiProcessCollector

        with self._alone():
            self._sweep()
            files = [str(path) for path in self.path.glob("*.db")]
            return list(MultiProcessCollector.merge(files))

    def _lock(self, pid: int) -> Path:
        return self.path / f"worker-{pid}.lock"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep others, threads and processes, from beginning or merging inside the block."""
        with (self.path / "merge.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._finish()
            yield

    def _sweep(self) -> None:
        with contextlib.ExitStack() as locks:
            dead: dict[str, list[Path]] = defaultdict(list)
            lives: dict[int, bool] = {}
            for path in self.path.glob("*.db"):
                if match := _OF_WORKER.fullmatch(path.name):
                    pid = int(match[2])
                    if pid not in lives:
                        lives[pid] = self._lives(pid, locks)
                    if lives[pid]:
                        continue
                    if path.stat().st_size < _HEADER:
                        path.unlink()  # nothing was counted, and no reader takes it
                    else:
                        dead[match[1]].append(path)
            if dead:
                self._merge(dead, [pid for pid, alive in lives.items() if not alive])

    def _lives(self, pid: int, locks: contextlib.ExitStack) -> bool:
        lock = locks.enter_context(self._lock(pid).open("a"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False

    def _merge(self, dead: dict[str, list[Path]], pids: list[int]) -> None:
        gone = [path.name for paths in dead.values() for path in paths]
        kinds = [kind for kind in dead if not kind.startswith("gauge")]
        try:
            for kind in kinds:
                self._add_up(kind, dead[kind])
            # From here on it is done as a whole: if this process is killed, by the next one.
            steps = {"kinds": kinds, "gone": gone + [self._lock(pid).name for pid in pids]}
            draft = self._journal.with_suffix(".draft")
            draft.write_text(json.dumps(steps), encoding="utf-8")
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            logger.warning("no space to merge the metrics of %d dead workers", len(pids))
            return
        draft.replace(self._journal)
        self._finish()

    def _add_up(self, kind: str, files: list[Path]) -> None:
        from prometheus_client.mmap_dict import MmapedDict

        earlier, fresh = self._merged(kind)
        totals: dict[str, float] = defaultdict(float)
        for path in [earlier, *files] if earlier.exists() else files:
            for key, value, _, _ in MmapedDict.read_all_values_from_file(str(path)):
                totals[key] += value
        fresh.unlink(missing_ok=True)
        # Per value its key, a length, padding and two numbers.
        _take_space(fresh, sum(len(key.encode()) + 32 for key in totals) + (1 << 12))
        merged = MmapedDict(str(fresh))
        for key, value in totals.items():
            merged.write_value(key, value, 0.0)
        merged.close()

    def _finish(self) -> None:
        if not self._journal.exists():
            return
        steps = json.loads(self._journal.read_text(encoding="utf-8"))
        for kind in steps["kinds"]:
            merged, fresh = self._merged(kind)
            if fresh.exists():
                fresh.replace(merged)
        for name in steps["gone"]:
            (self.path / name).unlink(missing_ok=True)
        self._journal.unlink()

    def _merged(self, kind: str) -> tuple[Path, Path]:
        return self.path / f"{kind}_merged.db", self.path / f"{kind}_merged.fresh"


def join() -> MetricFolder | None:
    """Let this worker's metrics be exported; to be called before prometheus-client is imported.

    The launcher names the folder, and exports. Under plain TorchServe the workers of one server
    share a temporary folder, and one of them exports on the port that ``MAMBAMIC_METRICS_PORT``
    names, 8083 unless it says so, on loopback; with 0 there are no metrics.

    Returns:
        The folder, to be kept for as long as the worker is to count as living.

    Raises:
        UsageError: ``MAMBAMIC_METRICS_PORT`` is not a port.
    """
    port = _port()
    named = os.environ.get(FOLDER_VARIABLE)
    if not named and not port:
        return None
    try:
        path = Path(named) if named else _folder_of_server()
        path.mkdir(parents=True, exist_ok=True)
        folder = MetricFolder(path)
        folder.register()
    except OSError as error:
        # A server without metrics is better than none.
        logger.error("no metrics of this worker: %s", error)
        os.environ.pop(FOLDER_VARIABLE, None)
        return None
    os.environ[FOLDER_VARIABLE] = str(folder.path)
    if port:
        threading.Thread(target=_export, args=(folder, port), daemon=True).start()
    return folder


def listen(folder: MetricFolder, port: int) -> None:
    """Answer on a port of loopback with the metrics of a folder, in a thread.

    Raises:
        OSError: The port is taken.
    """
    from prometheus_client import CollectorRegistry, start_http_server
    from prometheus_client.registry import Collector

    class Merged(Collector):
        def collect(self) -> Iterable[Metric]:
            return folder.collect()

    registry = CollectorRegistry()
    registry.register(Merged())
    start_http_server(port, "127.0.0.1", registry)


def _export(folder: MetricFolder, port: int) -> None:
    while True:
        try:
            listen(folder, port)
            break
        except OSError:
            # Another worker has it, or another server.
            time.sleep(RETRY_S)
    while True:
        time.sleep(SWEEP_S)
        folder.tend()


def _port() -> int:
    stated = os.environ.get(PORT_VARIABLE, str(DEFAULT_PORT))
    if not (stated.isascii() and stated.isdecimal() and int(stated) < 1 << 16):
        raise UsageError(
            f"{PORT_VARIABLE}={stated!r}",
            "a port, or 0 for no metrics",
            "set it to a free port of this machine, or unset it",
        )
    return int(stated)


def _folder_of_server() -> Path:
    """Return the folder of all workers that the same TorchServe started."""
    import psutil

    from mambamic.launcher.processes import started

    server = os.getppid()
    prefix = f"mambamic-metrics-{os.getuid()}-"
    root = Path(tempfile.gettempdir())
    for other in root.glob(f"{prefix}*"):
        pid = other.name.removeprefix(prefix).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            _remove(other)
    # A process id may come again, begun at another time.
    folder = root / f"{prefix}{server}-{started(server)}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "a folder of another user's", str(folder))
    return folder


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def _take_space(path: Path, size: int) -> None:
    with path.open("ab") as file:
        before = file.tell()
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError:
            if not before:
                path.unlink()
            raise
