"""The folder of one server: its archives, configuration, logs, gate, metrics, and who it is."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from mambamic.launcher.processes import started

MAIN_CLASS = "org.pytorch.serve.ModelServer"
EXPORTER_LOG = "exporter.log"


def state_root() -> Path:
    """Return where servers keep their folders: ``MAMBAMIC_STATE``, else the user's state folder."""
    if chosen := os.environ.get("MAMBAMIC_STATE"):
        return Path(chosen)
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "mambamic"


def find_process(pid: int, begun: int, argument: str) -> psutil.Process | None:
    """Return a process, or None where it has ended, whoever has its pid now.

    Args:
        pid: Of the process.
        begun: When it was ``started``.
        argument: One of its command line.
    """
    try:
        process = psutil.Process(pid)
        same = started(pid) == begun
        alive = same and process.status() != psutil.STATUS_ZOMBIE
        return process if alive and argument in process.cmdline() else None
    except psutil.Error:
        return None


@dataclass(frozen=True)
class Record:
    """A server that was started.

    Args:
        pid: Of Java, which leads a session of its own.
        begun: When that process was ``started``: a recycled pid differs here.
        host: Where predictions are answered.
        port: Where predictions are answered.
        scratch: The temporary folder of the server.
        logs: Where it logs.
        models: ``name/version`` of each model.
        exporter: The process that exports the workers' metrics.
        exporter_begun: When that was ``started``.
    """

    pid: int
    begun: int
    host: str
    port: int
    scratch: str
    logs: str
    models: list[str]
    exporter: int = 0
    exporter_begun: int = 0

    def process(self) -> psutil.Process | None:
        """Return Java's process, or None where it has ended, whoever has its pid now."""
        return find_process(self.pid, self.begun, MAIN_CLASS)


@dataclass(frozen=True)
class ServerFolder:
    """The folder of the server on one port."""

    root: Path

    @classmethod
    def of_port(cls, port: int) -> ServerFolder:
        """Return the folder that belongs to a port."""
        return cls(state_root() / f"serve-{port}")

    @property
    def store(self) -> Path:
        """The archives that are served."""
        return self.root / "models"

    @property
    def gate(self) -> Path:
        """What launcher and workers share."""
        return self.root / "gate"

    @property
    def metrics(self) -> Path:
        """Where the workers count, see ``handlers.metric_files``."""
        return self.root / "metrics"

    @property
    def config(self) -> Path:
        """TorchServe's configuration."""
        return self.root / "config.properties"

    @property
    def log_config(self) -> Path:
        """The frontend's logging configuration."""
        return self.root / "log4j2.xml"

    @property
    def keys(self) -> Path:
        """The tokens that TorchServe writes to its working directory."""
        return self.root / "key_file.json"

    @property
    def _record(self) -> Path:
        return self.root / "server.json"

    def create(self) -> None:
        """Make the folder, for its owner only: it may hold tokens."""
        self._create_root()
        for folder in (self.store, self.gate, self.metrics):
            folder.mkdir(exist_ok=True)

    def _create_root(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)

    @contextmanager
    def claim(self) -> Iterator[bool]:
        """Hold the folder, for a start, inside the block.

        Yields:
            Whether it could be had: a second start at the same time cannot.
        """
        self._create_root()
        with (self.root / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                # Not before: who holds it may be about to make these anew.
                self.create()
                yield True

    def write(self, record: Record) -> None:
        """Remember a server."""
        self._record.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")

    def read(self) -> Record | None:
        """Return the remembered server, running or not."""
        try:
            return Record(**json.loads(self._record.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def forget(self, record: Record) -> None:
        """Drop a server and its tokens, unless another one is remembered here by now."""
        if self.read() not in (record, None):
            return
        self._record.unlink(missing_ok=True)
        self.keys.unlink(missing_ok=True)
