"""Whether a server answers, and whether it still has the workers to do so: for probes."""

from __future__ import annotations

import http.client
import time

from mambamic.errors import ServerError
from mambamic.launcher import probe
from mambamic.launcher.folders import Record, ServerFolder


def check_ready(port: int, timeout: float) -> list[str]:
    """Let every model of a server classify a drawn cell.

    Args:
        port: Of predictions.
        timeout: Seconds for all of them together.

    Returns:
        ``name/version`` of each model.

    Raises:
        ServerError: No server runs on the port, or a model gives no prediction in time.
    """
    deadline = time.monotonic() + timeout
    folder, record = _running(port)
    headers = {probe.MARK: "1", **_token(folder, port, "inference")}
    for model in record.models:
        path = f"/predictions/{model}"
        reply = _ask(record, deadline, port, "POST", path, headers)
        if reply.status != 200:
            raise ServerError(
                f"{model} answers a drawn cell with status {reply.status}",
                "a prediction",
                f"see the logs in {record.logs}",
            )
    return record.models


def check_live(port: int, timeout: float) -> list[str]:
    """Look for workers that TorchServe has given up on.

    Where a worker fails again and again TorchServe stops to start it anew, after five minutes:
    requests then wait in the queue for ever. Only a new server mends that.

    Args:
        port: Of predictions.
        timeout: Seconds for all questions together.

    Returns:
        ``name/version`` of each model.

    Raises:
        ServerError: No server runs on the port, its frontend does not answer, a worker was given
            up, or a model has no worker that is ready, as for seconds after one was killed.
    """
    deadline = time.monotonic() + timeout
    folder, record = _running(port)
    # "Partial Healthy", with 200, where one of several workers is given up on. While one is being
    # started again it still says "Healthy". Of a model's versions it knows only the default one.
    ping = _ask(record, deadline, port, "GET", "/ping", _token(folder, port, "inference"))
    if ping.status != 200 or b'"Healthy"' not in ping.body:
        raise ServerError(
            f"TorchServe's health is {ping.status} {ping.body[:80].decode('utf-8', 'replace')!r}",
            "Healthy: no worker that it gave up on",
            f"start the server anew; why the worker failed is in {record.logs}/model_log.log",
        )
    headers = _token(folder, port, "management")
    for model in record.models:
        reply = _ask(record, deadline, port + 1, "GET", f"/models/{model}", headers)
        if not _has_ready_worker(reply):
            raise ServerError(
                f"{model} has no worker that is ready",
                "at least one",
                "if that lasts longer than a worker takes to load, start the server anew",
            )
    return record.models


def _running(port: int) -> tuple[ServerFolder, Record]:
    folder = ServerFolder.of_port(port)
    record = folder.read()
    if record is None or record.process() is None:
        raise ServerError(
            f"no server runs on port {port}",
            f"one that was started with the same MAMBAMIC_STATE, here {folder.root.parent}",
            f"start it: mambamic serve --port {port}",
        )
    return folder, record


def _token(folder: ServerFolder, port: int, kind: str) -> dict[str, str]:
    return probe.token(folder, port, kind) if folder.keys.exists() else {}


def _ask(
    record: Record,
    deadline: float,
    port: int,
    method: str,
    path: str,
    headers: dict[str, str],
) -> probe.Reply:
    # The management API is on loopback, wherever predictions are answered.
    host = probe.reachable(record.host) if port == record.port else "127.0.0.1"
    try:
        left = max(0.001, deadline - time.monotonic())
        return probe.ask(port, method, path, headers=headers, host=host, timeout=left)
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(
            f"no answer to {method} {path} on port {port} ({error or type(error).__name__})",
            "one in time",
            f"see the logs in {record.logs}, or allow more by --timeout",
        ) from error


def _has_ready_worker(reply: probe.Reply) -> bool:
    if reply.status != 200:
        return False
    return any(
        worker["status"] == "READY"
        for described in reply.json()
        for worker in described.get("workers", ())
    )
