"""The process that exports what the workers of one server count, until its Java has ended.

Not in a worker, which may be killed and take the port with it for as long as another needs to
load; nor in the launcher's own process, which ends when the server is up.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from mambamic.handlers.metric_files import SWEEP_S, MetricFolder, listen
from mambamic.launcher import processes
from mambamic.launcher.folders import (
    EXPORTER_LOG,
    MAIN_CLASS,
    Record,
    ServerFolder,
    find_process,
)

_MODULE = "mambamic.launcher.exporter"


def start(folder: ServerFolder, port: int, java: psutil.Process, logs: Path) -> psutil.Popen:
    """Start the exporter of a server, detached.

    Args:
        folder: The server's.
        port: On loopback.
        java: The server's frontend, with which the exporter ends.
        logs: Where it writes what goes wrong.
    """
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    arguments = [str(folder.metrics), str(port), str(java.pid), str(processes.started(java.pid))]
    with (logs / EXPORTER_LOG).open("ab") as log:
        return psutil.Popen(
            [sys.executable, "-m", _MODULE, *arguments],
            cwd=folder.root,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(record: Record) -> None:
    """End the exporter of a server, where it has not ended by itself."""
    process = find_process(record.exporter, record.exporter_begun, _MODULE)
    if process is not None:
        processes.end(process, patience=2)


def main(arguments: Sequence[str]) -> None:
    """Export until Java has ended.

    Args:
        arguments: The folder of metrics, the port, and of Java its pid and when it was started.

    Raises:
        OSError: The port is taken.
    """
    path, port, pid, begun = arguments
    folder = MetricFolder(Path(path))
    listen(folder, int(port))
    while find_process(int(pid), int(begun), MAIN_CLASS) is not None:
        # Also where nobody asks: workers may die meanwhile.
        folder.tend()
        time.sleep(SWEEP_S)


if __name__ == "__main__":
    main(sys.argv[1:])
