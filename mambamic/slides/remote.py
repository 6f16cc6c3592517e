"""Tiles scored by a running server, at the pace that it can keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mambamic.client import Client, Patience
from mambamic.errors import MambamicError, UsageError
from mambamic.prediction import Prediction
from mambamic.preprocess import Pixels
from mambamic.slides.scorers import Scored
from mambamic.slides.settings import ModelFacts

_TOLERANCE = 0.02  # a server may compute in half precision, which differs by less


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

    Raises:
        ServerError: It cannot be reached.
        UsageError: It has another model.
    """

    batch = 64
    encoded = True

    def __init__(
        self, server: Server, checkpoint: Path, facts: ModelFacts, *, embeddings: bool
    ) -> None:
        self.facts = facts
        self.threads = server.connections
        self._server = server
        self._embeddings = embeddings
        # A run of hours outlasts a restart of the server.
        self._client = Client(
            server.url,
            model=server.model,
            token=server.token,
            ca=server.ca,
            patience=Patience(overall=900),
            connections=server.connections,
        )
        try:
            self._check(checkpoint)
        except BaseException:
            self._client.close()
            raise

    def _check(self, checkpoint: Path) -> None:
        """Refuse a server whose answer is not that of the checkpoint."""
        import io

        from PIL import Image

        from mambamic.classifier import Classifier
        from mambamic.launcher.probe import draw_cell

        cell = draw_cell()
        with Image.open(io.BytesIO(cell)) as image:
            (ours,) = Classifier.load(checkpoint, "cpu").predict([image])
        theirs = self._client.predict([cell])[0]
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
        """Score PNG files."""
        assert not isinstance(tiles, np.ndarray)
        outcomes = self._client.predict(list(tiles), embedding=self._embeddings)
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

    def describe(self) -> dict[str, Any]:
        """Return where the server is."""
        return {"server": self._server.url, "model": self._server.model}

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def _stacked(rows: list[tuple[float, ...] | None]) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    width = next((len(row) for row in rows if row is not None), None)
    if width is None:
        return None
    return np.array([row or (np.nan,) * width for row in rows], np.float32)
