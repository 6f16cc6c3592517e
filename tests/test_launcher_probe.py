from __future__ import annotations

import http.server
import io
import json
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from PIL import Image

from mambamic.launcher.folders import ServerFolder
from mambamic.launcher.probe import ask, draw_cell, reachable, token, worker_failure

WORKER = """\
2026-01-01T00:00:00,000 [INFO ] W-9000-cells_1.0-stdout - Torch worker started.
2026-01-01T00:00:01,000 [INFO ] W-9000-cells_1.0-stdout - Backend worker process died.
2026-01-01T00:00:01,000 [INFO ] W-9001-other_1.0-stdout - Torch worker started.
2026-01-01T00:00:01,000 [INFO ] W-9000-cells_1.0-stdout - Traceback (most recent call last):
2026-01-01T00:00:01,000 [INFO ] W-9000-cells_1.0-stdout - ValueError: no - such weights
2026-01-01T00:00:02,000 [INFO ] W-9000-cells_1.0-stdout - Listening on port: /tmp/x
2026-01-01T00:00:03,000 [INFO ] W-9000-cells_1.0-stdout - Backend worker process died.
"""


def test_the_last_words_of_the_first_worker_that_died(tmp_path: Path) -> None:
    assert worker_failure(tmp_path) is None
    (tmp_path / "model_log.log").write_text(WORKER.splitlines()[0] + "\n")
    assert worker_failure(tmp_path) is None
    (tmp_path / "model_log.log").write_text(WORKER)
    assert worker_failure(tmp_path) == (
        "Backend worker process died.\n"
        "Traceback (most recent call last):\n"
        "ValueError: no - such weights"
    )


def test_a_worker_that_could_not_even_start(tmp_path: Path) -> None:
    (tmp_path / "model_log.log").write_text(
        "2026-01-01T00:00:00,000 [WARN ] W-9000-cells_1.0-stderr - ImportError: no yaml\n"
    )
    (tmp_path / "ts_log.log").write_text(
        "2026-01-01T00:00:00,000 [ERROR] W-9000-cells_1.0 - Backend worker error\n"
        "org.pytorch.serve.wlm.WorkerInitializationException: Backend stream closed.\n"
    )
    assert worker_failure(tmp_path) == "ImportError: no yaml"


def test_a_model_that_the_frontend_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "ts_log.log").write_text(
        "2026-01-01T00:00:00,000 [WARN ] main - Failed to load model: 0.mar\n"
        "org.pytorch.serve.archive.model.InvalidModelException: Missing manifest\n"
    )
    reason = worker_failure(tmp_path)
    assert reason is not None
    assert "Missing manifest" in reason


def test_the_drawn_cell_is_an_image() -> None:
    with Image.open(io.BytesIO(draw_cell())) as image:
        assert (image.format, image.size, image.mode) == ("PNG", (224, 224), "RGB")
    assert draw_cell() == draw_cell()


@pytest.mark.parametrize(("host", "address"), [("0.0.0.0", "127.0.0.1"), ("10.0.0.1", "10.0.0.1")])
def test_where_a_server_is_reached(host: str, address: str) -> None:
    assert reachable(host) == address


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(418)
        self.end_headers()
        self.wfile.write(b'{"got": "%s"}' % body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Keep quiet."""


def test_asking_goes_past_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        reply = ask(server.server_port, "POST", "/", b"this")
    assert reply.status == 418
    assert reply.json() == {"got": "this"}


def keys(key: str, hours: float) -> str:
    end = datetime.now(timezone.utc) + timedelta(hours=hours)
    stated = end.strftime("%Y-%m-%dT%H:%M:%S") + ".733615652Z"
    return json.dumps(
        {"inference": {"key": key, "expiration time": stated}, "API": {"key": "of-the-api"}}
    )


def test_a_token_is_renewed_only_after_it_has_expired(tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    class Tokens(Handler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            (tmp_path / "key_file.json").write_text(keys("new", 1))
            self.send_response(200)
            self.end_headers()

    folder = ServerFolder(tmp_path)
    with http.server.HTTPServer(("127.0.0.1", 0), Tokens) as server:
        port = server.server_port - 1
        assert token(folder, port) == {}
        folder.keys.write_text(keys("given", 0.9))
        assert token(folder, port) == {"Authorization": "Bearer given"}
        threading.Thread(target=server.handle_request, daemon=True).start()
        folder.keys.write_text(keys("old", -0.1))
        assert token(folder, port) == {"Authorization": "Bearer new"}
    assert asked == [("/token?type=inference", "Bearer of-the-api")]
