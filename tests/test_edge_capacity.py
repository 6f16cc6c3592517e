from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from mambamic.edge.capacity import in_flight, measured
from mambamic.edge.settings import Upstream


def test_a_processor_gets_few_and_a_gpu_two_batches() -> None:
    assert in_flight(1, 32, gpu=False) == 6
    assert in_flight(3, 32, gpu=False) == 18
    assert in_flight(2, 32, gpu=True) == 128
    # TorchServe's own queue of 1000 never overflows: it would answer that there is no worker.
    assert in_flight(64, 128, gpu=True) == 500


@pytest.mark.parametrize(
    ("models", "limit"),
    [
        ({"a": [{"maxWorkers": 2, "batchSize": 32, "workers": [{"gpu": False}]}]}, 12),
        (
            {
                "a": [{"maxWorkers": 2, "batchSize": 16, "workers": [{"gpu": True}]}],
                "b": [{"maxWorkers": 1, "batchSize": 16, "workers": []}] * 2,
            },
            76,
        ),
    ],
)
def test_the_management_api_is_asked(models: dict[str, list[Any]], limit: int) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _, _, name, *_ = (*self.path.split("?")[0].split("/"), "")
            listed = {"models": [{"modelName": model} for model in models]}
            body = json.dumps(models.get(name, listed)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *ignored: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        upstream = Upstream("127.0.0.1", server.server_address[1] - 1)
        assert measured(upstream).in_flight == limit
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    # Where nobody answers, or far away, the default settings are supposed.
    assert measured(upstream).in_flight == in_flight(1, 32, gpu=False)
    assert measured(Upstream("nowhere.invalid", 8080)).in_flight == in_flight(1, 32, gpu=False)
