"""TorchServe without the launcher, as who has an installation of it uses an archive."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import urllib3

from mambamic import metrics
from mambamic.export.archive import HANDLER_FILE, write_archive

from .counts import total
from .servers import free_port, of_state, plain_torchserve, post, wait_for


@dataclass(frozen=True)
class Plain:
    """Such a server."""

    state: Path
    url: str
    metrics_port: int


@pytest.fixture(scope="module")
def plain(quick_checkpoint: Path) -> Iterator[Plain]:
    """One that has answered; it ends as TorchServe itself ends it."""
    with tempfile.TemporaryDirectory(prefix="mambamic-test-") as folder:
        state = Path(folder)
        archive = write_archive(quick_checkpoint, state / "store" / "mambamic.mar", workers=2)
        with zipfile.ZipFile(archive) as written:
            assert HANDLER_FILE in written.namelist()
        metrics_port = free_port() + 3
        with plain_torchserve(archive, state, metrics_port) as port:
            address = f"http://127.0.0.1:{port}"
            assert wait_for(lambda: is_up(f"{address}/ping"), 60)
            yield Plain(state, f"{address}/predictions/mambamic", metrics_port)


def is_up(address: str) -> bool:
    try:
        urllib3.request("GET", address, retries=False, timeout=5)
    except urllib3.exceptions.HTTPError:
        return False
    return True


def test_a_worker_exports_and_another_takes_over(plain: Plain, cell: bytes) -> None:
    def answers() -> bool:
        try:
            return post(plain.url, body=cell, headers={"Content-Type": "image/png"}).status == 200
        except urllib3.exceptions.HTTPError:
            return False

    def starts() -> float:
        try:
            return total(plain.metrics_port, metrics.WORKER_STARTS)
        except urllib3.exceptions.HTTPError:
            return 0

    assert wait_for(answers, 60)
    assert wait_for(lambda: starts() == 2, 60)
    before = total(plain.metrics_port, metrics.PREDICTIONS)
    assert before == 1
    (exporter,) = (
        process
        for process in of_state(plain.state)
        if any(at.laddr.port == plain.metrics_port for at in process.net_connections("tcp"))
    )
    os.kill(exporter.pid, signal.SIGKILL)
    assert wait_for(lambda: starts() == 3, 60)
    assert total(plain.metrics_port, metrics.PREDICTIONS) == before


def test_an_archive_answers(plain: Plain, cell: bytes) -> None:
    reply = post(plain.url, fields={"image": ("cell.png", cell, "image/png")})
    assert reply.status == 200
    assert reply.json()["model"] == "mambamic"
    # Without the launcher the worker decodes text itself; the answer is the same.
    for content_type, body in (("text/plain", b"hello"), ("application/json", b"{}")):
        reply = post(plain.url, body=body, headers={"Content-Type": content_type})
        assert reply.status == 415
        assert json.loads(reply.data)["error"]["code"] == "unsupported_media_type"
    twice = [("image", ("cell.png", cell, "image/png"))] * 2
    assert post(plain.url, fields=twice).status == 400
