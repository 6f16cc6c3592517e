"""Stopping a server without dropping a request, and tidying up after one."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import time
from collections.abc import Callable, Sequence

import psutil

from mambamic.errors import ServerError
from mambamic.handlers.gate import Gate
from mambamic.launcher import exporter, probe, processes
from mambamic.launcher.folders import Record, ServerFolder

DRAIN_TIMEOUT_S = 30
# What has been sent is not yet in the frontend's queue: a large body is copied there a few times.
SETTLE_S = 0.25


def stop(
    port: int, drain: float = DRAIN_TIMEOUT_S, say: Callable[[str], None] = lambda _: None
) -> bool:
    """Stop the server on a port: answer what has arrived, refuse what comes later, end Java.

    Args:
        port: Of predictions.
        drain: Seconds that requests in flight have to be answered.
        say: Told what could not be waited for.

    Returns:
        Whether a server was running.

    Raises:
        ServerError: A process could not be ended.
    """
    folder = ServerFolder.of_port(port)
    record = folder.read()
    if record is None:
        return False
    java = record.process()
    if java is None:
        # Java has died by itself; workers that it left behind are still in its session.
        end_orphans(record)
    else:
        _drain(folder, record, drain, say)
        _check_ended(processes.end(java))
    tidy(folder, record)
    return java is not None


def end_orphans(record: Record) -> None:
    """End the workers of a server whose Java has ended.

    Raises:
        ServerError: One could not be ended.
    """
    _check_ended(processes.end_found(lambda: _orphans(record)))


def tidy(folder: ServerFolder, record: Record) -> None:
    """Remove what a server that has ended leaves, but for its logs."""
    exporter.end(record)
    shutil.rmtree(record.scratch, ignore_errors=True)
    folder.forget(record)


def _check_ended(left: Sequence[psutil.Process]) -> None:
    if left:
        raise ServerError(
            f"processes {', '.join(str(process.pid) for process in left)} do not end",
            "them to end when killed",
            "they wait for a device or disk: see dmesg, and end them when it is back",
        )


def _orphans(record: Record) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        # The number of the session may be another one's by now, the temporary folder is not.
        with contextlib.suppress(OSError, psutil.Error):
            ours = process.environ().get("TMPDIR") == record.scratch
            if ours and os.getsid(process.pid) == record.pid:
                found.append(process)
    return found


def _drain(
    folder: ServerFolder, record: Record, timeout: float, say: Callable[[str], None]
) -> None:
    """Wait for what was in flight when this was called; then the gate is shut.

    The frontend's queue is first in, first out: once a request of our own comes back, all that
    came before it has been handed to a worker. Once every worker has begun a batch after that
    was announced, all of it has been begun; and what is begun is waited for.
    """
    deadline = time.monotonic() + timeout
    gate = Gate(folder.gate)
    time.sleep(SETTLE_S)
    gate.announce()
    headers = probe.token(folder, record.port) if folder.keys.exists() else {}
    while _ask_all(record, headers, deadline) and gate.unheard():
        time.sleep(0.02)
    gate.close()
    if not gate.wait_idle(max(0.1, deadline - time.monotonic())):
        say(f"requests still in flight after {timeout:.0f} s are dropped")
    # The workers are done; the frontend still has the last answers to write.
    time.sleep(0.2)


def _ask_all(record: Record, headers: dict[str, str], deadline: float) -> bool:
    """Send an empty request to each model, and tell whether, in time, a worker answered one."""
    answered = False
    for model in record.models:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            reply = probe.ask(
                record.port,
                "POST",
                f"/predictions/{model}",
                b"",
                headers=headers,
                host=probe.reachable(record.host),
                timeout=left,
            )
            # The frontend's own errors, of a token or a model without workers, have a code instead.
            answered |= "error" in reply.json()
    return answered
