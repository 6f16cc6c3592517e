"""Tiles scored by a running server, at the pace that it can keep."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mambamic.client import Client, Patience
from mambamic.errors import (
    AnswerError,
    DecodeError,
    InferenceError,
    MambamicError,
    MediaTypeError,
    NoAnswerError,
    OverloadedError,
    RateLimitedError,
    TooLargeError,
    UnavailableError,
    UsageError,
    WorkerLostError,
)
from mambamic.prediction import Prediction
from mambamic.preprocess import Pixels
from mambamic.slides.scorers import Scored
from mambamic.slides.settings import ModelFacts

_TOLERANCE = 0.02  # a server may compute in half precision, which differs by less
# At first nothing is lost, and a wrong address should show: no longer than a server takes to start.
# A run of hours outlasts a restart.
_AT_FIRST, _UNDER_WAY = Patience(overall=30), Patience(overall=900)
_OF_THE_IMAGE = (DecodeError, TooLargeError, MediaTypeError)
# The server's own trouble, which passes: no word about the image.
_PASSING = (
    AnswerError,
    NoAnswerError,
    OverloadedError,
    RateLimitedError,
    UnavailableError,
    WorkerLostError,
)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0


@dataclass(frozen=True)
class Server:
    """Where a server is.

    Args:
        url: ``http://HOST:PORT`` or ``https://HOST:PORT``.
        model: The model's name there.
        token: A bearer token.
        ca: Certificates to trust.
        connections: Requests at a time.
    """

    url: str
    model: str = "mambamic"
    token: str | None = None
    ca: Path | None = None
    connections: int = 4


class ServerScorer:
    """A server that has the same checkpoint.

    Never more requests are under way than there are connections, and the readers wait for these:
    a busy server slows the run down, by the ``Retry-After`` that it states, and nothing is lost.

    Args:
        server: Where it is.
        checkpoint: The same as the server's.
        facts: Of the checkpoint.
        embeddings: Whether to ask for them.
        patience: How long a tile is asked for again, where the server fails.

    Raises:
        ServerError: It cannot be reached.
        UsageError: It has another model.
    """

    batch = 64
    encoded = True

    def __init__(
        self,
        server: Server,
        checkpoint: Path,
        facts: ModelFacts,
        *,
        embeddings: bool,
        patience: Patience = _UNDER_WAY,
    ) -> None:
        self.facts = facts
        self.threads = server.connections
        self._server = server
        self._embeddings = embeddings
        self._patience = patience
        self._closed = threading.Event()
        self._check(checkpoint)
        self._client = self._connected(patience)

    def _connected(self, patience: Patience) -> Client:
        server = self._server
        return Client(
            server.url,
            model=server.model,
            token=server.token,
            ca=server.ca,
            patience=patience,
            connections=server.connections,
        )

    def _check(self, checkpoint: Path) -> None:
        """Refuse a server whose answer is not that of the checkpoint."""
        import io

        from PIL import Image

        from mambamic.classifier import Classifier
        from mambamic.launcher.probe import draw_cell

        cell = draw_cell()
        with self._connected(_AT_FIRST) as client:
            (theirs,) = client.predict([cell])
        with Image.open(io.BytesIO(cell)) as image:
            (ours,) = Classifier.load(checkpoint, "cpu").predict([image])
        if isinstance(theirs, MambamicError):
            raise theirs
        names = list(ours.probabilities) == list(theirs.probabilities)
        if not names or any(
            abs(p - theirs.probabilities[name]) > _TOLERANCE
            for name, p in ours.probabilities.items()
        ):
            raise UsageError(
                f"the server {self._server.url} has another model than {checkpoint}",
                "the same checkpoint here and there: it decides how tiles are cut and named",
                "give --model the checkpoint that the server was started with",
            )

    def score(self, tiles: Pixels | Sequence[bytes]) -> Scored:
        """Score PNG files.

        Raises:
            MambamicError: The server still failed when patience ended; no tile is the cause.
        """
        assert not isinstance(tiles, np.ndarray)
        outcomes = self._outcomes(tiles)
        classes = self.facts.classes
        probabilities = np.full((len(outcomes), len(classes)), np.nan, np.float32)
        embeddings: list[tuple[float, ...] | None] = [None] * len(outcomes)
        refused = {}
        for place, outcome in enumerate(outcomes):
            if isinstance(outcome, Prediction):
                probabilities[place] = [outcome.probabilities[name] for name in classes]
                embeddings[place] = outcome.embedding
            else:
                refused[place] = outcome.problem
        return Scored(probabilities, _stacked(embeddings), refused)

    def _outcomes(self, tiles: Sequence[bytes]) -> list[Prediction | MambamicError]:
        """Ask until each tile has a prediction, or an error that is about that tile."""
        last_start = time.monotonic() + self._patience.overall
        pause = _FIRST_PAUSE_S
        outcomes: dict[int, Prediction | MambamicError] = {}
        waiting = list(range(len(tiles)))
        while True:
            answers = self._ask([tiles[n] for n in waiting])
            # The model fails on an image or on one beside it: asked once more, it tells.
            failed = {n for n, said in outcomes.items() if isinstance(said, InferenceError)}
            outcomes |= zip(waiting, answers, strict=True)
            waiting = [n for n in waiting if _is_open(outcomes[n], again=n in failed)]
            if not waiting:
                return [outcomes[n] for n in range(len(tiles))]
            trouble = next((said for said in answers if isinstance(said, _PASSING)), None)
            late = time.monotonic() + pause > last_start
            if (trouble is not None and late) or self._closed.wait(pause):
                raise trouble or UsageError("the scorer is closed", "an open one", "make another")
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _ask(self, tiles: Sequence[bytes]) -> list[Prediction | MambamicError]:
        try:
            return self._client.predict(list(tiles), embedding=self._embeddings)
        except (AnswerError, NoAnswerError) as error:
            return [error] * len(tiles)

    def describe(self) -> dict[str, Any]:
        """Return where the server is."""
        return {"server": self._server.url, "model": self._server.model}

    def close(self) -> None:
        """Close the connections; who still waits for an answer gives up."""
        self._closed.set()
        self._client.close()


def _is_open(said: Prediction | MambamicError, *, again: bool) -> bool:
    """Tell whether a tile is to be asked for again; raise what is no fault of it, and stays."""
    if isinstance(said, _PASSING):
        return True
    if isinstance(said, InferenceError):
        return not again
    if isinstance(said, MambamicError) and not isinstance(said, _OF_THE_IMAGE):
        raise said
    return False


def _stacked(rows: list[tuple[float, ...] | None]) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    width = next((len(row) for row in rows if row is not None), None)
    if width is None:
        return None
    return np.array([row or (np.nan,) * width for row in rows], np.float32)
