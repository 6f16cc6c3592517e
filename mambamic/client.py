"""A client: images in, predictions out, in order, whatever the server goes through meanwhile.

It needs neither torch nor a checkpoint. Images travel several to a request, over connections that
are kept. A request is sent again only where it cannot have done harm, or was told to come back:

- the connection was refused or reset, or could not be made;
- 429 and 503: too much at hand, starting or stopping;
- 507, once: the process that had it was killed, and if the image is what killed it, a second time
  is enough.

What the server answered for good (every other 4xx, 500, 502) and a time-out are never sent again.
"""

from __future__ import annotations

import json
import os
import random
import ssl
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    InvalidHeader,
    LocationParseError,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
    SSLError,
)

from mambamic._version import __version__
from mambamic.bundles import Bundle, Limits, bundles
from mambamic.errors import (
    AnswerError,
    DecodeError,
    MambamicError,
    NoAnswerError,
    OverloadedError,
    ServerError,
    TooLargeError,
    UnauthorizedError,
    UsageError,
    named,
)
from mambamic.prediction import Prediction

Outcome: TypeAlias = "Prediction | MambamicError"
# Of these the server, and no image, is the cause, and the next request would fare no better.
_GIVES_UP = {401, 403, 404, 405, 429, 503}
_AGAIN = {429, 503}
_LOST = 507
_TOO_LARGE = 413
# TorchServe's own errors, which it sends with the status 400.
_CODES = {"InvalidKeyException": "unauthorized"}
_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 10.0


@dataclass(frozen=True)
class Patience:
    """How long a client waits, in seconds.

    Args:
        answer: For the answer to one request, once it was sent.
        connect: For a connection.
        overall: From the first try of a request to the start of the last one.
    """

    answer: float = 120
    connect: float = 5
    overall: float = 120

    def __post_init__(self) -> None:
        if min(self.answer, self.connect) <= 0 or self.overall < 0:
            raise UsageError(f"{self}", "seconds above 0", "choose another number")


class Client:
    """Ask a server, or the edge in front of one, for predictions. Use it as a context manager.

    Args:
        url: Of the server: ``http://HOST:PORT`` or ``https://...``.
        model: The model's name there, or ``NAME/VERSION``.
        token: Sent as a bearer token.
        ca: A file of certificates to trust in place of the system's, PEM.
        patience: Time-outs, and how long to try again.
        limits: How many images go into a request.
        connections: Requests at a time.

    Raises:
        UsageError: The address is none.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str = "mambamic",
        token: str | None = None,
        ca: str | os.PathLike[str] | None = None,
        patience: Patience | None = None,
        limits: Limits | None = None,
        connections: int = 2,
    ) -> None:
        self._base = _checked(url)
        self._path = f"/predictions/{model}"
        self._patience = patience or Patience()
        self._limits = limits or Limits()
        self._connections = connections
        self._headers = {"User-Agent": f"mambamic/{__version__}", "Accept": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._http = urllib3.PoolManager(
            maxsize=connections,
            block=True,
            retries=False,
            timeout=urllib3.Timeout(connect=self._patience.connect, read=self._patience.answer),
            ca_certs=None if ca is None else os.fspath(ca),
        )
        self._threads = ThreadPoolExecutor(connections, "mambamic-client")
        self._closed = threading.Event()

    def __enter__(self) -> Client:
        """Return the client itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections; calling it twice does no harm.

        What waits to be sent again, in another thread, is given up at once.
        """
        self._closed.set()
        self._threads.shutdown(cancel_futures=True)
        self._http.clear()

    def predict(
        self, images: Sequence[bytes | Path | str], *, embedding: bool = False
    ) -> list[Outcome]:
        """Classify images.

        Args:
            images: The bytes of image files, or their paths.
            embedding: Whether to ask for what the network's head sees.

        Returns:
            One per image, in order: the prediction, or the error that says why there is none.

        Raises:
            ServerError: The server cannot be reached, or does not speak HTTP.
            UnauthorizedError, NotFoundError: It does not know the token, or the model.
            OverloadedError, RateLimitedError, UnavailableError: It still took no requests when
                patience ended.
        """
        return list(self.stream(images, embedding=embedding))

    def stream(
        self, images: Iterable[bytes | Path | str], *, embedding: bool = False
    ) -> Generator[Outcome, None, None]:
        """Classify images as ``predict`` does, one after the other, and hold few of them at a time.

        Args:
            images: As many as there are.
            embedding: Whether to ask for what the network's head sees.
        """
        under_way: deque[Future[list[Outcome]]] = deque()
        try:
            for bundle in bundles(map(_content, images), self._limits):
                under_way.append(self._threads.submit(self._answers, bundle, embedding))
                # One more than there are connections is ready when one becomes free.
                if len(under_way) > self._connections:
                    yield from under_way.popleft().result()
            while under_way:
                yield from under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()

    def _answers(self, bundle: Bundle, embedding: bool) -> list[Outcome]:
        """Return what the server says of each image of a bundle."""
        if not bundle.contents:
            return list(bundle.outcomes(()))
        reply = self._send(*bundle.encoded(embedding))
        body = _json(reply)
        if reply.status == _TOO_LARGE and isinstance(body, dict) and len(bundle.contents) > 1:
            # An edge may be stricter than the limits that were supposed here.
            return [one for half in bundle.halves() for one in self._answers(half, embedding)]
        if isinstance(body, dict) and "error" in body:
            error = _named(reply.status, body)
            if reply.status in _GIVES_UP or isinstance(error, UnauthorizedError):
                raise error
            return list(bundle.outcomes([error] * len(bundle.contents)))
        entries = body if isinstance(body, list) else [body]
        if len(entries) != len(bundle.contents):
            raise _strange(reply)
        return list(bundle.outcomes([_outcome(reply, entry) for entry in entries]))

    def _send(self, body: bytes, content_type: str) -> urllib3.BaseHTTPResponse:
        """Send a request, and again where that is safe; return the last answer."""
        last_start = time.monotonic() + self._patience.overall
        was_lost = False
        wait = _FIRST_WAIT_S
        while True:
            stated = None
            try:
                reply = self._post(body, content_type)
            except (NewConnectionError, ConnectTimeoutError, ProtocolError) as error:
                failure: MambamicError | None = _unreachable(self._base, error)
            else:
                failure = None
                if reply.status not in _AGAIN and (reply.status != _LOST or was_lost):
                    return reply
                was_lost |= reply.status == _LOST
                stated = _retry_after(reply)
            # Clients that were sent away together are not to come back together.
            pause = (
                wait * random.uniform(0.5, 1)
                if stated is None
                else stated * random.uniform(1, 1.25)
            )
            if time.monotonic() + pause > last_start or self._closed.wait(pause):
                if failure is not None:
                    raise failure
                return reply
            wait = min(2 * wait, _LONGEST_WAIT_S)

    def _post(self, body: bytes, content_type: str) -> urllib3.BaseHTTPResponse:
        try:
            return self._http.request(
                "POST",
                self._base + self._path,
                body=body,
                headers={**self._headers, "Content-Type": content_type},
            )
        except ReadTimeoutError as error:
            raise NoAnswerError(
                f"no answer from {self._base} within {self._patience.answer:g} seconds",
                "one",
                "send fewer images at a time, or allow more time",
            ) from error
        except (NewConnectionError, ConnectTimeoutError, ProtocolError):
            raise
        except HTTPError as error:
            raise _unreachable(self._base, error) from error


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        good = good and parts.path in ("", "/") and not parts.query and parts.username is None
    except (ValueError, LocationParseError):
        good = False
    if not good:
        raise UsageError(
            f"the address {url!r}",
            "http://HOST:PORT or https://HOST:PORT, without a path",
            "write, for example, http://127.0.0.1:8000",
        )
    return url.rstrip("/")


def _content(image: bytes | Path | str) -> bytes | MambamicError:
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    try:
        return Path(image).read_bytes()
    except OSError as error:
        return DecodeError(
            f"it cannot be read ({error.strerror})", "an image file", "check the path"
        )


def _retry_after(reply: urllib3.BaseHTTPResponse) -> float | None:
    """Return the seconds that an answer asks to wait, stated as such or as a date.

    None where it asks for no wait at all: to come back at once, again and again, helps nobody.
    """
    try:
        stated = urllib3.Retry().get_retry_after(reply) or 0.0
    except InvalidHeader:
        return None
    return stated if stated >= _FIRST_WAIT_S else None


def _json(reply: urllib3.BaseHTTPResponse) -> Any:
    try:
        body = json.loads(reply.data)
    except ValueError:
        body = None
    if isinstance(body, dict | list) and body:
        # TorchServe's own errors are {"code": 507, "type": ..., "message": ...}.
        if reply.status == 200 or isinstance(body, list) or "error" in body:
            return body
        message = str(body.get("message", "")) or f"status {reply.status}"
        code = _CODES.get(str(body.get("type")), "")
        return {"error": {"code": code, "message": message}}
    if reply.status == _TOO_LARGE:
        error = TooLargeError(
            "the server refuses so large a request", "a smaller one", "send fewer or smaller images"
        )
        return error.as_json()
    if reply.status == 200:
        raise _strange(reply)
    return {"error": {"code": "", "message": f"the server answered with the status {reply.status}"}}


def _named(status: int, body: dict[str, Any]) -> MambamicError:
    try:
        code, message = str(body["error"]["code"]), str(body["error"]["message"])
    except (KeyError, TypeError):
        code, message = "", f"the server answered with the status {status}"
    if status in _AGAIN and not code:
        return OverloadedError(
            f"{message} (status {status})", "a server with room", "try again later"
        )
    return named(code, status, message)


def _outcome(reply: urllib3.BaseHTTPResponse, entry: Any) -> Outcome:
    try:
        if "error" in entry:
            return _named(500, entry)
        embedding = entry.get("embedding")
        return Prediction(
            label=str(entry["label"]),
            probability=float(entry["probability"]),
            probabilities={str(name): float(p) for name, p in entry["probabilities"].items()},
            embedding=None if embedding is None else tuple(map(float, embedding)),
            ood_score=entry.get("ood_score"),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _strange(reply) from error


def _strange(reply: urllib3.BaseHTTPResponse) -> AnswerError:
    return AnswerError(
        f"an answer with the status {reply.status} that is not of a mambamic server",
        "JSON with a prediction for each image",
        "check the address, and that client and server are of the same version",
    )


def _unreachable(base: str, error: HTTPError) -> ServerError:
    said, remedy = "nobody answers", "check the address, and start one by: mambamic serve"
    if isinstance(error, SSLError):
        said, remedy = "it does not speak TLS", "write http:// where there is no TLS"
        if any(isinstance(part, ssl.SSLCertVerificationError) for part in error.args):
            said = "its certificate was refused"
            remedy = (
                "give the file of who signed it (--ca FILE), and the name that it is made out to"
            )
    return ServerError(
        f"{base} cannot be used: {said} ({type(error).__name__})",
        "a running server, or an edge in front of one",
        remedy,
    )
