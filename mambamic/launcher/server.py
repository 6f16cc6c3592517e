"""Starting a server and waiting for its first answer; stopping it without dropping a request."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from mambamic.errors import ServerError
from mambamic.handlers.gate import Gate
from mambamic.launcher import probe, processes
from mambamic.launcher.archives import Model, ModelSpec, prepare
from mambamic.launcher.folders import Record, ServerFolder
from mambamic.launcher.java import find_java
from mambamic.launcher.settings import (
    Settings,
    command,
    config_properties,
    environment,
    log_config,
)

START_TIMEOUT_S = 180
DRAIN_TIMEOUT_S = 30
# TorchServe's worker imports these and its package does not declare them all.
_NEEDED = {"ts": "torchserve==0.12.0", "torch": "torch", "yaml": "pyyaml", "psutil": "psutil"}


@dataclass
class Server:
    """A server that was started by this process."""

    settings: Settings
    folder: ServerFolder
    record: Record
    java: psutil.Process
    models: list[Model]


def check_packages() -> None:
    """Check that what the worker imports is there.

    Raises:
        ServerError: Something is missing; TorchServe's worker would die of it, and be restarted,
            for ever.
    """
    missing = [name for module, name in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ServerError(
            f"not installed: {', '.join(missing)}",
            "everything that TorchServe's workers import",
            "run pip install 'mambamic[serve]'",
        )


def running(port: int) -> Record | None:
    """Return the server that this user started on a port, or None where none is running."""
    record = ServerFolder.of_port(port).read()
    return record if record is not None and record.process() is not None else None


def check_ports(settings: Settings) -> None:
    """Check that the three ports are free.

    Raises:
        ServerError: One is in use; the message says by which server of ours, if it is one.
    """
    if (record := running(settings.port)) is not None:
        raise ServerError(
            f"a mambamic server (pid {record.pid}, {', '.join(record.models)}) is already running "
            f"on port {settings.port}",
            "a free port",
            f"use it, stop it by: mambamic serve --stop --port {settings.port}, or choose another "
            "by --port",
        )
    for port, host in (
        (settings.port, settings.host),
        (settings.management_port, "127.0.0.1"),
        (settings.metrics_port, "127.0.0.1"),
    ):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((host, port))
            except OSError as error:
                raise ServerError(
                    f"port {port} on {host} cannot be used ({error.strerror})",
                    f"ports {settings.port} (predictions), {settings.management_port} (management) "
                    f"and {settings.metrics_port} (metrics) to be free",
                    f"choose others by --port, for example --port {settings.port + 10}",
                ) from error


def start(specs: Sequence[ModelSpec], settings: Settings, logs: Path | None = None) -> Server:
    """Start TorchServe, detached, and return at once.

    Args:
        specs: The models.
        settings: How to serve them.
        logs: Where to log, if not in the server's own folder.

    Raises:
        ServerError: Java or a package is missing, or a port is taken.
        CheckpointError: A model cannot be packed.
    """
    check_packages()
    check_ports(settings)
    java = find_java()
    folder = ServerFolder.of_port(settings.port)
    folder.create()
    folder.forget()
    logs = (logs or folder.root / "logs").absolute()
    _clear_logs(logs)
    models = prepare(specs, settings, folder.store)
    Gate(folder.gate).open()
    folder.config.write_text(
        config_properties(settings, folder, [model.archive for model in models]), encoding="utf-8"
    )
    folder.log_config.write_text(log_config(settings, logs), encoding="utf-8")
    # Not inside the folder: the path of a worker's socket may be 107 bytes at most.
    scratch = Path(tempfile.mkdtemp(prefix=f"mambamic-{settings.port}-"))
    threads = max(1, (os.cpu_count() or 1) // (settings.workers * len(models)))
    with (logs / "console.log").open("wb") as console:
        process = subprocess.Popen(
            command(java, folder, scratch, sys.executable),
            cwd=folder.root,
            env=environment(folder, logs, scratch, threads),
            stdin=subprocess.DEVNULL,
            stdout=None if settings.foreground else console,
            stderr=subprocess.STDOUT if not settings.foreground else None,
            start_new_session=True,
        )
    handle = psutil.Process(process.pid)
    record = Record(
        pid=process.pid,
        created=handle.create_time(),
        host=settings.host,
        port=settings.port,
        scratch=str(scratch),
        logs=str(logs),
        models=[f"{model.name}/{model.version}" for model in models],
    )
    folder.write(record)
    return Server(settings, folder, record, handle, models)


def _clear_logs(logs: Path) -> None:
    logs.mkdir(parents=True, exist_ok=True)
    # The failure of an earlier start must not be taken for this one's.
    for log in logs.glob("*.log"):
        log.replace(log.with_suffix(".log.old"))


def wait_ready(server: Server, body: bytes, timeout: float = START_TIMEOUT_S) -> list[str]:
    """Wait until every model has answered a real prediction.

    Args:
        server: Just started.
        body: An image file.
        timeout: Seconds.

    Returns:
        The answers, JSON text, one per model.

    Raises:
        ServerError: Java or a worker died, with what it said, or time is up. The server runs on:
            call `abandon`.
    """
    deadline = time.monotonic() + timeout
    headers: dict[str, str] = {}
    while not (_listening(server.settings) and (headers or not server.settings.token_auth)):
        _check_alive(server, deadline)
        if server.settings.token_auth and server.folder.keys.exists():
            headers = probe.token(server.folder, server.settings.port)
        time.sleep(0.05)
    # A request waits in the queue until the model is loaded, and for ever if it never is: /ping
    # says that a server is healthy whose worker is only being started.
    pool = ThreadPoolExecutor(len(server.models))
    try:
        asked = [
            (model, pool.submit(_predict, server.settings, model, body, headers, timeout))
            for model in server.models
        ]
        while not all(answer.done() for _, answer in asked):
            _check_alive(server, deadline)
            time.sleep(0.05)
        return [_answer_text(server, model, answer) for model, answer in asked]
    finally:
        pool.shutdown(wait=False)


def _listening(settings: Settings) -> bool:
    try:
        address = (probe.reachable(settings.host), settings.port)
        with socket.create_connection(address, timeout=1):
            return True
    except OSError:
        return False


def _check_alive(server: Server, deadline: float) -> None:
    logs = Path(server.record.logs)
    if probe.worker_failure(logs) is not None:
        # A traceback is written line by line.
        time.sleep(0.5)
        reason = probe.worker_failure(logs)
        raise ServerError(
            f"the model's worker failed:\n{reason}\n",
            "a worker that loads the model",
            f"mend what the traceback says; the full logs are in {logs}",
        )
    if server.record.process() is None:
        console = logs / "console.log"
        said = console.read_text(encoding="utf-8", errors="replace") if console.exists() else ""
        raise ServerError(
            f"TorchServe's frontend ended:\n{said[-4000:]}\n",
            "a Java process that stays",
            f"see the logs in {logs}",
        )
    if time.monotonic() > deadline:
        raise ServerError(
            "no prediction within the time allowed for a start",
            "a worker that loads its model sooner",
            f"see the logs in {logs}",
        )


def _predict(
    settings: Settings, model: Model, body: bytes, headers: dict[str, str], timeout: float
) -> probe.Reply:
    return probe.ask(
        settings.port,
        "POST",
        model.path,
        body,
        headers={"Content-Type": "image/png", **headers},
        host=probe.reachable(settings.host),
        timeout=timeout,
    )


def _answer_text(server: Server, model: Model, answer: Future[probe.Reply]) -> str:
    try:
        reply = answer.result()
        problem = f"status {reply.status}: {reply.body[:2000].decode('utf-8', 'replace')}"
        if reply.status == 200:
            return reply.body.decode()
    except (OSError, http.client.HTTPException) as error:
        problem = str(error) or type(error).__name__
    raise ServerError(
        f"{model.name}/{model.version} answers the sample image with {problem}",
        "a prediction",
        f"see the logs in {server.record.logs}",
    )


def abandon(server: Server) -> None:
    """End a server that did not come up, leaving nothing but its logs."""
    processes.end(server.java, patience=2)
    _tidy(server.folder, server.record)


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
        _end_orphans(record)
        _tidy(folder, record)
        return False
    _drain(folder, record, drain, say)
    processes.end(java)
    left = processes.of_session(java)
    if left:
        raise ServerError(
            f"processes {', '.join(str(process.pid) for process in left)} do not end",
            "them to end when killed",
            "they wait for a device or disk: see dmesg, and end them when it is back",
        )
    _tidy(folder, record)
    return True


def _drain(
    folder: ServerFolder, record: Record, timeout: float, say: Callable[[str], None]
) -> None:
    """Wait for what was in flight when this was called; then the gate is shut.

    The frontend's queue is first in, first out: once a request of our own comes back, all that
    came before it are with a worker.
    """
    deadline = time.monotonic() + timeout
    gate = Gate(folder.gate)
    headers = probe.token(folder, record.port) if folder.keys.exists() else {}
    for model in record.models:
        left = max(0.1, deadline - time.monotonic())
        with contextlib.suppress(OSError, http.client.HTTPException):
            probe.ask(
                record.port,
                "POST",
                f"/predictions/{model}",
                b"",
                headers=headers,
                host=probe.reachable(record.host),
                timeout=left,
            )
    gate.close()
    if not gate.wait_idle(max(0.1, deadline - time.monotonic())):
        say(f"requests still in flight after {timeout:.0f} s are dropped")
    # The workers are done; the frontend still has the last answers to write.
    time.sleep(0.2)


def _end_orphans(record: Record) -> None:
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            ours = process.environ().get("TMPDIR") == record.scratch
            if ours and os.getsid(process.pid) == record.pid:
                process.kill()


def _tidy(folder: ServerFolder, record: Record) -> None:
    shutil.rmtree(record.scratch, ignore_errors=True)
    folder.forget()
