"""The client, against a server on a real socket that answers as it is told."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mambamic.bundles import Limits
from mambamic.client import Client, Patience
from mambamic.errors import (
    AnswerError,
    DecodeError,
    InferenceError,
    MambamicError,
    NoAnswerError,
    NotFoundError,
    OverloadedError,
    RateLimitedError,
    ServerError,
    TooLargeError,
    UnauthorizedError,
    UnavailableError,
    UsageError,
    WorkerLostError,
    named,
)
from mambamic.prediction import Prediction
from mambamic.zips import is_zip, read_zip

DROP = "drop"  # the connection is closed without an answer


@dataclass
class Reply:
    """An answer; without a body, a prediction for each image whose label is the image's bytes."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    wait: float = 0


@dataclass
class Script:
    """What the server answers, one after the other, and what it saw."""

    url: str = ""
    replies: list[Reply | str] = field(default_factory=list)
    most_bytes: int = 10**9
    seen: list[tuple[float, dict[str, str], bytes]] = field(default_factory=list)
    clients: set[int] = field(default_factory=set)


def predicted(content: bytes) -> dict[str, Any]:
    label = content.decode()
    if label.startswith("bad"):
        return DecodeError(f"{label} is no image", "an image", "send one").as_json()
    return {"label": label, "probability": 0.75, "probabilities": {label: 0.75, "other": 0.25}}


def answer_to(body: bytes) -> tuple[int, Any]:
    if not is_zip(body):
        single = predicted(body)
        return 400 if "error" in single else 200, single
    several = [{"name": name, **predicted(content)} for name, content in read_zip(body)]
    return 400 if all("error" in one for one in several) else 200, several


@pytest.fixture
def script() -> Iterator[Script]:
    told = Script()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            told.seen.append(
                (time.monotonic(), {k.lower(): v for k, v in self.headers.items()}, body)
            )
            told.clients.add(self.client_address[1])
            reply = told.replies.pop(0) if told.replies else Reply()
            if isinstance(reply, str):
                self.close_connection = True
                return
            time.sleep(reply.wait)
            status, content = reply.status, reply.body
            if len(body) > told.most_bytes:
                status, content = 413, TooLargeError("a body", "a smaller one", "cut it").as_json()
            elif reply.body is None and status == 200:
                status, content = answer_to(body)
            elif reply.body is None:
                content = {"code": status, "type": "InternalServerException", "message": "Gone."}
            encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
            with contextlib.suppress(OSError):  # a client whose patience has ended
                self.send_response(status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(encoded)))
                self.end_headers()
                self.wfile.write(encoded)

        def log_message(self, *ignored: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    told.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield told
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def client(script: Script, overall: float = 20, **more: Any) -> Client:
    return Client(script.url, patience=Patience(overall=overall), **more)


def labels(outcomes: list[Prediction | MambamicError]) -> list[str]:
    return [one.label if isinstance(one, Prediction) else one.code for one in outcomes]


def error(code: str, status: int = 500) -> Reply:
    said = {"error": {"code": code, "message": "it is so; expected it otherwise; mend it; or not"}}
    return Reply(status, said)


def test_one_image(script: Script) -> None:
    with client(script, model="cells/2.0", token="secret") as one:
        (outcome,) = one.predict([b"a"])
    assert outcome == Prediction("a", 0.75, {"a": 0.75, "other": 0.25})
    ((_, headers, body),) = script.seen
    assert body == b"a"
    assert headers["authorization"] == "Bearer secret"


def test_results_are_in_order_though_answers_are_not(script: Script) -> None:
    images = [f"image{number}".encode() for number in range(50)]
    script.replies = [Reply(wait=0.3), Reply(), Reply(wait=0.2)]
    with client(script, limits=Limits(tiles=4), connections=3) as one:
        outcomes = one.predict(images)
    assert labels(outcomes) == [image.decode() for image in images]
    assert len(script.seen) == 13
    assert len(script.clients) <= 3, "a connection for each request"


def test_bad_images_and_files_keep_their_places(script: Script, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"from a file")
    images: list[bytes | Path | str] = [
        b"x",
        tmp_path / "nothing",
        b"bad1",
        str(tmp_path / "a"),
        b"bad2",
    ]
    with client(script) as one:
        outcomes = one.predict(images)
    assert labels(outcomes) == [
        "x",
        "decode_failed",
        "decode_failed",
        "from a file",
        "decode_failed",
    ]
    assert str(outcomes[2]) == "bad1 is no image; expected an image; send one"
    assert "No such file" in str(outcomes[1])
    with client(script) as one:
        assert labels(one.predict([b"bad1", b"bad2"])) == ["decode_failed"] * 2
        assert labels(one.predict([b"bad1"])) == ["decode_failed"]


@pytest.mark.parametrize(
    "first",
    [
        Reply(429, headers={"Retry-After": "0"}),
        Reply(503),
        Reply(507),
        DROP,
        error("overloaded", 503),
    ],
    ids=str,
)
def test_what_may_be_sent_again_is(script: Script, first: Reply | str) -> None:
    script.replies = [first]
    with client(script) as one:
        assert labels(one.predict([b"a", b"b"])) == ["a", "b"]
    assert len(script.seen) == 2
    assert script.seen[0][2] == script.seen[1][2]


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (error("inference_failed"), InferenceError),
        (error("decode_failed", 400), DecodeError),
        (error("worker_lost", 502), WorkerLostError),
        (error("timeout", 504), NoAnswerError),
        (error("too_large", 413), TooLargeError),
        (Reply(413, b""), TooLargeError),
        (Reply(500), AnswerError),
    ],
)
def test_what_may_do_harm_again_is_not_sent_again(
    script: Script, reply: Reply, kind: type[MambamicError]
) -> None:
    script.replies = [reply]
    with client(script) as one:
        (outcome,) = one.predict([b"a"])
        assert type(outcome) is kind
        assert len(script.seen) == 1
        assert labels(one.predict([b"b"])) == ["b"]
    if isinstance(reply.body, dict):
        assert str(outcome) == reply.body["error"]["message"]
        assert isinstance(outcome, MambamicError)
        assert outcome.remedy == "mend it; or not"


def test_an_image_that_kills_is_sent_twice_and_no_more(script: Script) -> None:
    script.replies = [Reply(507), Reply(507), Reply(507)]
    with client(script) as one:
        (outcome,) = one.predict([b"a"])
    assert isinstance(outcome, WorkerLostError)
    assert len(script.seen) == 2


def test_a_time_out_is_not_sent_again(script: Script) -> None:
    script.replies = [Reply(wait=1)]
    with (
        Client(script.url, patience=Patience(answer=0.2)) as one,
        pytest.raises(NoAnswerError, match=r"within 0\.2 seconds"),
    ):
        one.predict([b"a"])
    assert len(script.seen) == 1


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(script: Script, form: str) -> None:
    # A date has whole seconds: of two to come at least one is left.
    date = datetime.now(timezone.utc) + timedelta(seconds=2)
    stated = "1" if form == "seconds" else format_datetime(date, usegmt=True)
    script.replies = [Reply(429, headers={"Retry-After": stated})]
    with client(script) as one:
        assert labels(one.predict([b"a"])) == ["a"]
    first, second = (moment for moment, _, _ in script.seen)
    assert second - first >= 0.9


@pytest.mark.parametrize("stated", [None, "0", "Mon, 02 Mar 2026 10:00:00 GMT", "soon"])
def test_waits_grow_and_differ(script: Script, stated: str | None) -> None:
    script.replies = [Reply(503, headers={"Retry-After": stated} if stated else {})] * 4
    with client(script) as one:
        assert labels(one.predict([b"a"])) == ["a"]
    moments = [moment for moment, _, _ in script.seen]
    waits = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert all(wait >= 0.1 * 2**number for number, wait in enumerate(waits))
    assert len({round(wait / 2**number, 4) for number, wait in enumerate(waits)}) > 1


def test_patience_ends(script: Script) -> None:
    script.replies = [Reply(429, error("rate_limited").body, {"Retry-After": "60"})]
    with client(script, overall=1) as one, pytest.raises(RateLimitedError):
        one.predict([b"a"])
    assert len(script.seen) == 1, "it would have come too early"
    script.replies = [error("unavailable", 503)] * 50
    with client(script, overall=1) as one, pytest.raises(UnavailableError):
        one.predict([b"a"])
    assert 3 <= len(script.seen) < 12
    script.replies = [Reply(503)] * 50
    with client(script, overall=0) as one, pytest.raises(OverloadedError, match=r"Gone.*503"):
        one.predict([b"a"])


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (error("unauthorized", 401), UnauthorizedError),
        (
            Reply(400, {"code": 400, "type": "InvalidKeyException", "message": "No."}),
            UnauthorizedError,
        ),
        (
            Reply(404, {"code": 404, "type": "ModelNotFoundException", "message": "None."}),
            NotFoundError,
        ),
        (Reply(200, b"<html>"), AnswerError),
        (Reply(200, [{"name": "0"}]), AnswerError),
        (Reply(200, {"label": 1}), AnswerError),
    ],
)
def test_what_concerns_every_image_ends_it(
    script: Script, reply: Reply, kind: type[MambamicError]
) -> None:
    script.replies = [reply]
    with client(script, limits=Limits(tiles=1)) as one, pytest.raises(kind):
        one.predict([b"a"] * 20)
    assert len(script.seen) < 20


def test_a_model_that_is_not_served_is_looked_for_by_its_name(script: Script) -> None:
    body = {"code": 404, "type": "ModelNotFoundException", "message": "Model not found: cells"}
    script.replies = [Reply(404, body)]
    with (
        client(script) as one,
        pytest.raises(NotFoundError, match="check the model's name") as told,
    ):
        one.predict([b"a"])
    assert told.value.problem == "Model not found: cells (status 404)"


def test_tls_where_there_is_none(script: Script) -> None:
    script.url = script.url.replace("http://", "https://")
    with client(script) as one, pytest.raises(ServerError, match=r"does not speak TLS.*http://"):
        one.predict([b"a"])


def test_a_server_with_a_lower_limit_gets_fewer_at_once(script: Script) -> None:
    script.most_bytes = 700
    images = [f"image{number}".encode() * 20 for number in range(9)]
    with client(script) as one:
        assert labels(one.predict([*images, b"y" * 701])) == [
            *(image.decode() for image in images),
            "too_large",
        ]


def test_a_refused_connection_is_tried_until_somebody_listens(script: Script) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    with (
        Client(address, patience=Patience(overall=0.7)) as one,
        pytest.raises(ServerError, match="nobody answers"),
    ):
        one.predict([b"a"])
    assert time.monotonic() - began > 0.1, "it was tried once"


def test_images_are_read_as_they_are_needed(script: Script) -> None:
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"a"

    with client(script, limits=Limits(tiles=2), connections=2) as one:
        outcomes = one.stream(endless())
        assert isinstance(next(outcomes), Prediction)
        assert taken <= 10
        outcomes.close()


@pytest.mark.parametrize(
    "address", ["127.0.0.1:8000", "ftp://x", "http://", "http://x/y", "http://x:y", "http://u:p@x"]
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(UsageError, match="http://HOST:PORT"):
        Client(address)


def test_patience_that_makes_no_sense() -> None:
    with pytest.raises(UsageError):
        Patience(answer=0)


def test_it_works_without_torch(script: Script, tmp_path: Path) -> None:
    path = tmp_path / "cell"
    path.write_bytes(b"a")
    code = (
        "import sys\n"
        "for name in ('torch', 'ts', 'psutil', 'yaml'): sys.modules[name] = None\n"
        "from mambamic.cli import main\n"
        f"sys.exit(main(['predict', {str(path)!r}, '--server', {script.url!r}, {str(path)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{path}  a      0.7500\n" * 2


def test_a_token_from_a_file_or_the_environment(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mambamic.cli import main

    image, tokens = tmp_path / "image", tmp_path / "tokens"
    image.write_bytes(b"a")
    tokens.write_text("# of the laboratory\n\nfrom-file\n")
    monkeypatch.setenv("MAMBAMIC_TOKEN", "from-environment")
    call = ["predict", "--server", script.url, str(image)]
    assert main(call) == 0
    assert main([*call, "--token-file", str(tokens)]) == 0
    assert [headers["authorization"] for _, headers, _ in script.seen] == [
        "Bearer from-environment",
        "Bearer from-file",
    ]
    tokens.write_text("# nothing\n")
    assert main([*call, "--token-file", str(tokens)]) == 2
    assert main(["predict", "--server", script.url]) == 2


def test_an_error_of_no_known_name() -> None:
    found = named("brewing", 418, "I am a teapot.")
    assert type(found) is AnswerError
    assert str(found).startswith("I am a teapot (status 418); expected a prediction")
