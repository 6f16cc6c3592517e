"""Starting real servers through the command line, and talking to them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import urllib3

from mambamic.launcher.folders import ServerFolder
from mambamic.launcher.java import find_java

from ..turns import WORKER

ROOT = Path(__file__).resolve().parent.parent.parent
Fields = list[tuple[str, tuple[str, bytes, str]]]


def free_port() -> int:
    """A port that is free together with the three after it."""
    # Each process of a test run has a range of its own: a port is taken some time after this look.
    first = 20000 + WORKER % 4 * 3000
    for offset in range(0, 3000, 7):
        port = first + (os.getpid() + offset) % 2990
        with contextlib.ExitStack() as stack:
            try:
                for number in range(port, port + 4):
                    trial = stack.enter_context(socket.socket())
                    trial.bind(("127.0.0.1", number))
            except OSError:
                continue
            return port
    raise AssertionError("no four free ports in a row")


def post(url: str, **what: Any) -> urllib3.BaseHTTPResponse:
    """Send one request, once, and wait for a busy machine."""
    return urllib3.request("POST", url, retries=False, timeout=120, **what)


def run_mambamic(
    state: Path, *arguments: str, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "mambamic", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=environment(state),
        check=False,
    )


def environment(state: Path) -> dict[str, str]:
    """The environment in which servers are started."""
    return {**os.environ, "MAMBAMIC_STATE": str(state), "NO_PROXY": "*"}


@dataclass(frozen=True)
class Answer:
    """What a client saw: a status, or 0 and the failure of the connection."""

    status: int
    body: bytes
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class RunningServer:
    """A server that a test talks to."""

    port: int
    state: Path
    printed: str
    model: str = "mambamic"
    _pool: urllib3.PoolManager = field(
        default_factory=lambda: urllib3.PoolManager(maxsize=64, retries=False, timeout=60)
    )

    @property
    def folder(self) -> ServerFolder:
        return ServerFolder(self.state / f"serve-{self.port}")

    @property
    def logs(self) -> Path:
        record = self.folder.read()
        assert record is not None
        return Path(record.logs)

    def _send(self, **what: Any) -> Answer:
        began = time.monotonic()
        url = f"http://127.0.0.1:{self.port}/predictions/{self.model}"
        try:
            reply = self._pool.request("POST", url, **what)
        except urllib3.exceptions.HTTPError as error:
            return Answer(0, repr(error).encode(), time.monotonic() - began)
        return Answer(reply.status, reply.data, time.monotonic() - began)

    def form(self, *fields: tuple[str, bytes, str]) -> Answer:
        """Send form fields, as ``curl -F`` does: name, content, content type."""
        return self._send(fields=[(name, ("file", data, kind)) for name, data, kind in fields])

    def body(
        self,
        data: bytes,
        content_type: str | None = "image/png",
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """Send a raw body."""
        stated = {} if content_type is None else {"Content-Type": content_type}
        return self._send(body=data, headers={**stated, **(headers or {})})

    def describe(self) -> dict[str, Any]:
        """What the management API says of the model."""
        reply = self._pool.request(
            "GET", f"http://127.0.0.1:{self.port + 1}/models/{self.model}?customized=true"
        )
        described: dict[str, Any] = reply.json()[0]
        return described

    def worker_pids(self) -> list[int]:
        """The processes of the model's workers that are ready."""
        workers = self.describe()["workers"]
        return [int(worker["pid"]) for worker in workers if worker["status"] == "READY"]


@contextlib.contextmanager
def serve(
    state: Path, model: str, *arguments: str, port: int | None = None
) -> Iterator[RunningServer]:
    """Start a server by ``mambamic serve``, and leave nothing of it behind."""
    port = free_port() if port is None else port
    try:
        done = run_mambamic(state, "serve", "--port", str(port), "--model", model, *arguments)
        assert done.returncode == 0, done.stderr
        yield RunningServer(port, state, done.stdout)
    finally:
        run_mambamic(state, "serve", "--stop", "--port", str(port))
        end_all(state)


@contextlib.contextmanager
def plain_torchserve(archive: Path, state: Path, metrics_port: int) -> Iterator[int]:
    """TorchServe without the launcher: its port of predictions. Stopped, it leaves nothing."""
    port = free_port()
    (state / "config.properties").write_text(
        f"inference_address=http://127.0.0.1:{port}\n"
        f"management_address=http://127.0.0.1:{port + 1}\n"
        f"metrics_address=http://127.0.0.1:{port + 2}\n"
        "grpc_inference_port=0\ngrpc_management_port=0\nnumber_of_gpu=0\n"
    )
    with tempfile.TemporaryDirectory(prefix="ts-") as scratch:
        variables = {
            **environment(state),
            "TMPDIR": scratch,
            "TEMP": scratch,
            "JAVA_HOME": str(find_java().executable.resolve().parent.parent),
            "PYTHONPATH": str(ROOT),
            "MAMBAMIC_METRICS_PORT": str(metrics_port),
        }
        torchserve = str(Path(sys.executable).with_name("torchserve"))
        start = [torchserve, "--start", "--ncs", "--disable-token-auth", "--model-store"]
        start += [str(archive.parent), "--models", f"mambamic={archive.name}"]
        start += ["--ts-config", "config.properties"]
        try:
            with (state / "torchserve.log").open("wb") as log:
                subprocess.run(
                    start, cwd=state, env=variables, stdout=log, stderr=log, timeout=60, check=True
                )
            yield port
            stop = [torchserve, "--stop", "--foreground"]
            subprocess.run(
                stop, cwd=state, env=variables, capture_output=True, timeout=60, check=True
            )
            assert wait_for(lambda: of_state(state) == [], 20)
        finally:
            end_all(state)


def of_state(state: Path) -> list[psutil.Process]:
    """Every living process whose environment names this state folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            named = process.environ().get("MAMBAMIC_STATE") == str(state)
            if named and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end_all(state: Path) -> None:
    """Kill what a failed test has left behind."""
    for process in of_state(state):
        with contextlib.suppress(psutil.Error):
            process.kill()


def end_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process that leads a session, with all that is in it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=20)


@dataclass
class Load:
    """Clients at once, each sending a bounded number of requests, with an image of its own.

    Where there are fewer images than clients they take turns. ``of_image`` holds what was answered
    to which image. A ``pause`` in seconds after each answer leaves cores to other tests where it
    matters that requests are always under way, and not that there are as many as can be answered.
    """

    server: RunningServer
    images: list[bytes]
    clients: int
    requests: int
    pause: float = 0
    answers: list[tuple[float, float, Answer]] = field(default_factory=list)
    of_image: list[tuple[int, Answer]] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def _client(self, number: int) -> None:
        image = number % len(self.images)
        for _ in range(self.requests):
            if self._stop.is_set():
                return
            began = time.monotonic()
            answer = self.server.body(self.images[image])
            self.answers.append((began, time.monotonic(), answer))
            self.of_image.append((image, answer))
            self._stop.wait(self.pause)

    def __enter__(self) -> Load:
        self._threads = [
            threading.Thread(target=self._client, args=(number,)) for number in range(self.clients)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def wait(self, timeout: float = 120) -> None:
        """Wait until every client is done."""
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), "a client got no answer"

    def stop(self) -> None:
        """Let every client end with the request that it has sent."""
        self._stop.set()
        self.wait()

    def __exit__(self, *ignored: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(90)


def wait_for(condition: Callable[[], bool], timeout: float) -> bool:
    """Wait until something holds, and tell whether it came about."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
