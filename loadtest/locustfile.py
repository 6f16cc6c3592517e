"""Scenarios for Locust: ``locust -f loadtest/locustfile.py --headless SCENARIO``.

SingleCells, Bursts, Mixed and SlowClients are the classes below. ``--rate`` sets how many requests
a second all users send together; without it each sends the next one when it has its answer.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gevent import get_hub
from locust import FastHttpUser, User, events, task

from loadtest import images
from loadtest.checks import fault
from loadtest.images import Sent
from loadtest.record import Record

RECORD = Record()
BURST = 16
BAD_SHARE = 0.05
# A slow sender's pieces, and the pause after each in seconds: about three for an image.
PIECES, PAUSE = 15, 0.2


def _options(parser: Any) -> None:
    parser.add_argument("--model", default="mambamic", help="its name on the server")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second, all users")
    parser.add_argument("--record", default="", help="write counts by status to this JSON file")


def _end(environment: Any, **ignored: Any) -> None:
    if environment.parsed_options.record:
        RECORD.write(Path(environment.parsed_options.record))


events.init_command_line_parser.add_listener(_options)
events.quitting.add_listener(_end)


def _pause(user: Any) -> float:
    """Return how long a user waits: an exponential gap, as of people who do not know each other."""
    options = user.environment.parsed_options
    if not options.rate:
        return 0.0
    # The gap is between starts, so the time of the answer is part of it.
    users = int(user.environment.runner.target_user_count)
    gap = random.expovariate(float(options.rate) / users)
    spent = time.monotonic() - float(user.last_start)
    return max(0.0, gap - spent)


def _arrive(user: Any) -> None:
    """Let a user come when it likes: all of them at one moment would be another scenario."""
    user.last_start = time.monotonic()
    time.sleep(_pause(user))


class _Sender(FastHttpUser):
    """A user who sends over a connection that is kept."""

    abstract = True
    wait_time = _pause
    on_start = _arrive
    last_start = 0.0
    connection_timeout = 10.0
    network_timeout = 130.0

    def send(self, kind: str, sent: Sequence[Sent]) -> None:
        """Send one image, or several in a ZIP, and look at the answer."""
        body = sent[0].content if len(sent) == 1 else images.zipped(sent)
        media_type = "application/octet-stream" if len(sent) == 1 else "application/zip"
        self.last_start = began = time.monotonic()
        path = f"/predictions/{self.environment.parsed_options.model}"
        content: Any = body  # annotated as text by Locust, and sent as it is
        kinds = {"Content-Type": media_type}
        with self.client.post(
            path, data=content, headers=kinds, catch_response=True, name=kind
        ) as answer:
            status = answer.status_code
            stated = dict((answer.headers or {}).items())
            wrong = fault(sent, status, stated, answer.content or b"")
            answer.request_meta["name"] = f"{kind} {status or 'no answer'}"
            RECORD.add(status, time.monotonic() - began, wrong)
            if wrong is None:
                answer.success()
            else:
                answer.failure(wrong)


class SingleCells(_Sender):
    """One cell a request."""

    cells = images.cells(32)

    @task
    def cell(self) -> None:
        """Send one."""
        self.send("cell", [random.choice(self.cells)])


class Bursts(_Sender):
    """Many tiles at once, then nothing for a while."""

    cells = images.cells(64)

    @task
    def burst(self) -> None:
        """Send a ZIP of tiles."""
        self.send("burst", random.sample(self.cells, min(BURST, len(self.cells))))


class Mixed(_Sender):
    """Many sizes and formats, some ZIPs, and five in a hundred that are no image."""

    good = images.mixed(48)
    bad = images.bad()

    def one(self) -> Sent:
        """Return an image, or what is none."""
        return random.choice(self.bad if random.random() < BAD_SHARE else self.good)

    @task(19)
    def image(self) -> None:
        """Send one."""
        self.send("image", [self.one()])

    @task(1)
    def several(self) -> None:
        """Send a few in a ZIP."""
        self.send("several", [self.one() for _ in range(4)])


class SlowClients(User):
    """Senders on a poor line: an image arrives in pieces, over seconds."""

    cells = images.cells(8)
    wait_time = _pause
    on_start = _arrive
    last_start = 0.0

    @task
    def trickle(self) -> None:
        """Send a cell slowly, over a connection of its own, and read the answer."""
        sent = random.choice(self.cells)
        self.last_start = began = time.monotonic()
        try:
            status, headers, body = self._send(sent.content)
        except (OSError, HTTPException):
            status, headers, body = 0, {}, b""
        seconds = time.monotonic() - began
        wrong = fault([sent], status, headers, body)
        RECORD.add(status, seconds, wrong)
        self.environment.events.request.fire(
            request_type="POST",
            name=f"slow {status or 'no answer'}",
            response_time=seconds * 1e3,
            response_length=len(body),
            exception=None if wrong is None else RuntimeError(wrong),
            context={},
        )

    def _send(self, content: bytes) -> tuple[int, dict[str, str], bytes]:
        address = urlsplit(self.host or "")
        path = f"/predictions/{self.environment.parsed_options.model}"
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {address.hostname}\r\nConnection: close\r\n"
            f"Content-Type: application/octet-stream\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        with socket.create_connection((address.hostname, address.port or 80), 30) as line:
            line.settimeout(130)
            line.sendall(head.encode())
            size = -(-len(content) // PIECES)
            for start in range(0, len(content), size):
                line.sendall(content[start : start + size])
                time.sleep(PAUSE)
            answer = HTTPResponse(line)
            answer.begin()
            return answer.status, dict(answer.getheaders()), answer.read()


# Making the images has kept the loop waiting. Its clock stands where it was, and the time of the
# run, which begins now, would be over at once.
get_hub().loop.update_now()
