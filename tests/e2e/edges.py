"""Real edges, started through the command line, and servers that do as they are told."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import urllib3

from .servers import Answer, RunningServer, end_all, free_port, run_mambamic, wait_for

PREDICT = "/predictions/mambamic"
# The beginning of a request, to be written to a socket as it is.
CELL = b"POST /predictions/mambamic HTTP/1.1\r\nHost: x\r\n"


@dataclass
class RunningEdge(RunningServer):
    """An edge that a test talks to."""

    arguments: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        return self.state / f"edge-{self.port}"

    @property
    def access_log(self) -> str:
        return (self.root / "logs" / "access.log").read_text(encoding="utf-8")

    def log_lines(self, count: int, before: int = 0) -> list[dict[str, Any]]:
        """Wait for ``count`` lines of the log after ``before`` others: nginx writes them late."""

        def written() -> bool:
            return len(self.access_log.splitlines()) >= before + count

        assert wait_for(written, 10), self.access_log
        return [json.loads(line) for line in self.access_log.splitlines()[before:]]

    def ask(self, method: str, path: str, **what: Any) -> urllib3.BaseHTTPResponse:
        """Send a request of any kind."""
        url = f"http://127.0.0.1:{self.port}{path}"
        return urllib3.request(method, url, retries=False, timeout=60, **what)

    def change(self, *arguments: str) -> str:
        """Call the same command again with other settings, and return what it prints."""
        done = run_mambamic(self.state, "edge", "--port", str(self.port), *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr


@contextlib.contextmanager
def edge(state: Path, *arguments: str, ports: list[int] | None = None) -> Iterator[RunningEdge]:
    """Start an edge by ``mambamic edge`` and leave nothing of it behind.

    Args:
        state: Its state folder.
        arguments: Of the command.
        ports: Of the servers behind it.
    """
    port = free_port()
    behind = [f"--upstream=127.0.0.1:{number}" for number in ports or ()]
    arguments = (*behind, *arguments)
    try:
        done = run_mambamic(state, "edge", "--port", str(port), *arguments)
        assert done.returncode == 0, done.stderr
        yield RunningEdge(port, state, done.stdout, arguments=arguments)
    finally:
        run_mambamic(state, "edge", "--stop", "--port", str(port))
        end_all(state)


@dataclass
class Seen:
    """A request as a scripted server got it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class ScriptedServer:
    """Stands for a TorchServe in a state that the real one is hard to bring into.

    ``answer`` is a status, ``"reset"`` for a connection that is cut, or a function that returns one
    of these and may wait before.
    """

    port: int
    answer: int | str | Callable[[], int | str] = 200
    seen: list[Seen] = field(default_factory=list)


@contextlib.contextmanager
def scripted(
    answer: int | str | Callable[[], int | str] = 200, port: int = 0
) -> Iterator[ScriptedServer]:
    """Run such a server, on a free port unless one is named."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            script.seen.append(Seen(self.command, self.path, headers, body))
            told = script.answer() if callable(script.answer) else script.answer
            if isinstance(told, str):
                # A reset and no orderly end: what the kernel does when a process is killed.
                self.connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                self.close_connection = True
                self.connection.close()
                return
            content = b'{"from": "%d"}' % script.port
            self.send_response(told)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Request-ID", "torchserve-own")
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _do  # noqa: N815

        def log_message(self, *ignored: object) -> None:
            pass

        def finish(self) -> None:
            with contextlib.suppress(OSError, ValueError):
                super().finish()

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *ignored: object) -> None:
            pass

    server = Server(("127.0.0.1", port), Handler)
    script = ScriptedServer(server.server_address[1], answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# An edge and the two servers behind it.
Front = tuple[RunningEdge, ScriptedServer, ScriptedServer]


def tries(*servers: ScriptedServer) -> int:
    """How many requests servers have seen."""
    return sum(len(server.seen) for server in servers)


def error_of(answer: Answer | urllib3.BaseHTTPResponse) -> str:
    """The code of an error answer, whose form is checked."""
    body: dict[str, dict[str, str]] = answer.json if isinstance(answer, Answer) else answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"code", "message"}
    return body["error"]["code"]
