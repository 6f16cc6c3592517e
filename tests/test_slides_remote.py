"""Tiles by a server, against one that answers as it is told."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mambamic import Classifier
from mambamic.client import Patience
from mambamic.errors import (
    AnswerError,
    InferenceError,
    NotFoundError,
    ServerError,
    TooLargeError,
    WorkerLostError,
)
from mambamic.launcher.probe import draw_cell
from mambamic.slides import remote
from mambamic.slides.remote import Server, ServerScorer
from mambamic.slides.scorers import checkpoint_facts

from .test_client import Reply, Script, script

__all__ = ["script"]
BROKEN = InferenceError("the model failed on this image", "a prediction", "send it again")


@pytest.fixture(scope="module")
def prediction(random_checkpoint: Path) -> dict[str, Any]:
    """What the checkpoint says of the image by which a server is known."""
    with Image.open(io.BytesIO(draw_cell())) as image:
        (said,) = Classifier.load(random_checkpoint, "cpu").predict([image])
    return said.as_json()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.01)


def _scorer(script: Script, checkpoint: Path, prediction: dict[str, Any]) -> ServerScorer:
    script.replies.insert(0, Reply(body=prediction))
    facts = checkpoint_facts(checkpoint)
    patience = Patience(overall=1)
    return ServerScorer(Server(script.url), checkpoint, facts, embeddings=False, patience=patience)


@pytest.mark.parametrize(
    "trouble",
    [
        Reply(500, {"code": 500, "type": "InternalServerException", "message": "Gone."}),
        Reply(502, b"<html>"),
        Reply(504, b"<html>"),
        Reply(body=[WorkerLostError("lost", "an answer", "wait").as_json()] * 2),
        Reply(body=[BROKEN.as_json()] * 2),
        Reply(body=b"no JSON"),
    ],
)
def test_trouble_that_passes_is_no_fault_of_a_tile(
    trouble: Reply, script: Script, random_checkpoint: Path, prediction: dict[str, Any]
) -> None:
    script.replies = [trouble, Reply(body=[prediction] * 2)]
    scorer = _scorer(script, random_checkpoint, prediction)
    scored = scorer.score([b"one", b"two"])
    scorer.close()
    assert scored.refused == {}
    assert np.isfinite(scored.probabilities).all()
    assert len(script.seen) == 3


def test_what_is_wrong_with_a_tile_is_its_own(
    script: Script, random_checkpoint: Path, prediction: dict[str, Any]
) -> None:
    large = TooLargeError("a tile of 99 gigapixels", "fewer", "cut it").as_json()
    script.replies = [
        Reply(body=[large, prediction, BROKEN.as_json()]),
        Reply(500, BROKEN.as_json()),  # of the third alone
    ]
    scorer = _scorer(script, random_checkpoint, prediction)
    scored = scorer.score([b"one", b"two", b"three"])
    scorer.close()
    assert scored.refused == {0: "a tile of 99 gigapixels", 2: "the model failed on this image"}
    assert np.isfinite(scored.probabilities).all(axis=1).tolist() == [False, True, False]


def test_trouble_that_stays_ends_the_run_and_refuses_no_tile(
    script: Script, random_checkpoint: Path, prediction: dict[str, Any]
) -> None:
    script.replies = [Reply(502, b"<html>") for _ in range(1000)]
    scorer = _scorer(script, random_checkpoint, prediction)
    with pytest.raises(AnswerError, match="502"):
        scorer.score([b"one", b"two"])
    script.replies = [Reply(body=[NotFoundError("no model", "one", "load it").as_json()] * 2)]
    with pytest.raises(NotFoundError):
        scorer.score([b"one", b"two"])
    scorer.close()


def test_a_wrong_port_shows_soon(random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert remote._AT_FIRST.overall < 60 < remote._UNDER_WAY.overall
    monkeypatch.setattr(remote, "_AT_FIRST", Patience(overall=0.5))
    began = time.monotonic()
    server = Server("http://127.0.0.1:9")
    with pytest.raises(ServerError, match="nobody answers"):
        ServerScorer(
            server, random_checkpoint, checkpoint_facts(random_checkpoint), embeddings=False
        )
    assert time.monotonic() - began < 10
