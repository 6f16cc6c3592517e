"""Starting a server and waiting for its first answer."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from mambamic.errors import ServerError
from mambamic.handlers.gate import Gate
from mambamic.handlers.metric_files import MetricFolder
from mambamic.launcher import exporter, probe, processes, stopping
from mambamic.launcher.archives import Model, ModelSpec, prepare
from mambamic.launcher.folders import EXPORTER_LOG, Record, ServerFolder
from mambamic.launcher.java import Java, find_java
from mambamic.launcher.settings import (
    CONSOLE_LOG,
    LOG_NAMES,
    Settings,
    command,
    config_properties,
    environment,
    log_config,
)
from mambamic.machine import usable_cpus

START_TIMEOUT_S = 180
# TorchServe's worker imports these and its package does not declare them all.
_NEEDED = {
    "ts": "torchserve==0.12.0",
    "torch": "torch",
    "yaml": "pyyaml",
    "psutil": "psutil",
    "prometheus_client": "prometheus-client",
}


@dataclass
class Server:
    """A server that was started by this process."""

    settings: Settings
    folder: ServerFolder
    record: Record
    java: psutil.Popen
    models: list[Model]
    exporter: psutil.Popen


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
    """Check that the four ports are free.

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
        (settings.exporter_port, "127.0.0.1"),
    ):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((host, port))
            except OSError as error:
                raise ServerError(
                    f"port {port} on {host} cannot be used ({error.strerror})",
                    f"ports {settings.port} (predictions), {settings.management_port} (management) "
                    f"and {settings.metrics_port} and {settings.exporter_port} (metrics) to be "
                    "free",
                    f"choose others by --port, for example --port {settings.port + 10}",
                ) from error


@contextlib.contextmanager
def starting(
    specs: Sequence[ModelSpec], settings: Settings, logs: Path | None = None
) -> Iterator[Server]:
    """Start TorchServe, detached; if the block fails, end it again and leave only its logs.

    Args:
        specs: The models.
        settings: How to serve them.
        logs: Where to log, if not in the server's own folder.

    Raises:
        ServerError: Java or a package is missing, a port is taken, or another start on the same
            port is under way.
        CheckpointError: A model cannot be packed.
    """
    check_packages()
    java = find_java()
    folder = ServerFolder.of_port(settings.port)
    with folder.claim() as claimed:
        if not claimed:
            raise ServerError(
                f"another mambamic serve is starting a server on port {settings.port}",
                "one start at a time on a port",
                "wait for it, or choose another port by --port",
            )
        if (earlier := folder.read()) is not None and earlier.process() is None:
            # Java has died by itself; a worker that it left behind would answer for nobody.
            stopping.end_orphans(earlier)
            stopping.tidy(folder, earlier)
        check_ports(settings)
        logs = (logs or folder.root / "logs").absolute()
        _clear_logs(logs)
        models = prepare(specs, settings, folder.store)
        Gate(folder.gate).open()
        MetricFolder(folder.metrics).clear()
        with processes.signals_held() as release:
            server = _launch(java, folder, settings, models, logs)
            try:
                release()
                yield server
            except BaseException:
                processes.end(server.java, patience=2)
                processes.end(server.exporter, patience=2)
                stopping.tidy(folder, server.record)
                raise


def _launch(
    java: Java, folder: ServerFolder, settings: Settings, models: list[Model], logs: Path
) -> Server:
    folder.config.write_text(
        config_properties(settings, folder, [model.archive for model in models]), encoding="utf-8"
    )
    folder.log_config.write_text(log_config(settings, logs), encoding="utf-8")
    # Not inside the folder: the path of a worker's socket may be 107 bytes at most.
    scratch = Path(tempfile.mkdtemp(prefix=f"mambamic-{settings.port}-"))
    threads = max(1, usable_cpus() // (settings.workers * len(models)))
    with (logs / CONSOLE_LOG).open("wb") as console:
        java_process = psutil.Popen(
            command(settings, java, folder, scratch, sys.executable),
            cwd=folder.root,
            env=environment(folder, logs, scratch, threads),
            stdin=subprocess.DEVNULL,
            stdout=None if settings.foreground else console,
            stderr=subprocess.STDOUT if not settings.foreground else None,
            start_new_session=True,
        )
    record = Record(
        pid=java_process.pid,
        begun=processes.started(java_process.pid),
        host=settings.host,
        port=settings.port,
        scratch=str(scratch),
        logs=str(logs),
        models=[f"{model.name}/{model.version}" for model in models],
    )
    exporting: psutil.Popen | None = None
    try:
        exporting = exporter.start(folder, settings.exporter_port, java_process, logs)
        begun = processes.started(exporting.pid)
        record = replace(record, exporter=exporting.pid, exporter_begun=begun)
        folder.write(record)
    except BaseException:
        for process in filter(None, (java_process, exporting)):
            processes.end(process, patience=2)
        stopping.tidy(folder, record)
        raise
    return Server(settings, folder, record, java_process, models, exporting)


def keep_exporter(server: Server) -> None:
    """Start the exporter anew where it has ended; what was counted is in its files."""
    if server.exporter.poll() is not None:
        settings, folder = server.settings, server.folder
        logs = Path(server.record.logs)
        server.exporter = exporter.start(folder, settings.exporter_port, server.java, logs)
        begun = processes.started(server.exporter.pid)
        server.record = replace(server.record, exporter=server.exporter.pid, exporter_begun=begun)
        folder.write(server.record)


def _clear_logs(logs: Path) -> None:
    logs.mkdir(parents=True, exist_ok=True)
    # The failure of an earlier start must not be taken for this one's.
    for name in LOG_NAMES:
        if (logs / name).exists():
            (logs / name).replace(logs / f"{name}.old")


def wait_ready(server: Server, body: bytes, timeout: float = START_TIMEOUT_S) -> list[str]:
    """Wait until every model has answered a real prediction.

    Args:
        server: Just started.
        body: An image file.
        timeout: Seconds.

    Returns:
        The answers, JSON text, one per model.

    Raises:
        ServerError: Java or a worker died, with what it said, or time is up.
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
        while not all(answer.done() for _, answer in asked) or not _exports(server.settings):
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


def _exports(settings: Settings) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", settings.exporter_port), timeout=1):
            return True
    except OSError:
        return False


def _check_alive(server: Server, deadline: float) -> None:
    logs = Path(server.record.logs)
    if server.exporter.poll() is not None:
        said = (logs / EXPORTER_LOG).read_text(encoding="utf-8", errors="replace")
        raise ServerError(
            f"the exporter of metrics ended:\n{said[-2000:]}\n",
            "a process that stays",
            f"see whether port {server.settings.exporter_port} is free",
        )
    if probe.worker_failure(logs) is not None:
        # A traceback is written line by line.
        time.sleep(0.5)
        reason = probe.worker_failure(logs)
        raise ServerError(
            f"the model's worker failed:\n{reason}\n",
            "a worker that loads the model",
            f"mend what the traceback says; the full logs are in {logs}",
        )
    if server.java.poll() is not None:
        console = logs / CONSOLE_LOG
        said = console.read_text(encoding="utf-8", errors="replace") if console.exists() else ""
        raise ServerError(
            f"TorchServe's frontend ended, with status {server.java.returncode}:\n{said[-4000:]}\n",
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
