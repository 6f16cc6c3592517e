"""What the scenarios send, and what they take for an answer."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loadtest import images
from loadtest.checks import fault
from loadtest.images import Sent
from loadtest.record import Record
from mambamic.errors import DecodeError, MambamicError
from mambamic.images import decode

GOOD, BAD = Sent(b"cell"), Sent(b"junk", good=False)
PREDICTION = {"label": "a", "probability": 0.9, "probabilities": {"a": 0.9, "b": 0.1}}
ERROR = DecodeError("junk", "an image", "send one").as_json()
BUSY = {"Retry-After": "1"}


@pytest.mark.parametrize(
    ("sent", "status", "body", "said"),
    [
        ([GOOD], 200, PREDICTION, None),
        ([BAD], 400, ERROR, None),
        ([GOOD, BAD], 200, [PREDICTION, ERROR], None),
        ([BAD, BAD], 400, [ERROR, ERROR], None),
        ([GOOD], 0, None, "no answer"),
        ([GOOD], 500, ERROR, "500 to a good image"),
        ([GOOD], 503, ERROR, "503 to a good image"),
        ([GOOD], 400, ERROR, "400 to a good image"),
        ([GOOD], 200, ERROR, "a good image without a prediction"),
        ([BAD], 200, PREDICTION, "200 to bad input"),
        ([BAD], 500, ERROR, "500 to bad input"),
        ([BAD], 400, {"code": 400}, "bad input without an error"),
        ([GOOD, BAD], 200, [PREDICTION], "200 without an entry for each image"),
        ([GOOD, GOOD], 200, [PREDICTION, ERROR], "a good image without a prediction"),
        ([GOOD], 200, {**PREDICTION, "label": "b"}, "a prediction that contradicts itself"),
        (
            [GOOD],
            200,
            {"label": "a", "probabilities": {"a": float("nan")}},
            "a prediction that contradicts itself",
        ),
    ],
)
def test_answers(sent: list[Sent], status: int, body: Any, said: str | None) -> None:
    assert fault(sent, status, {}, json.dumps(body).encode()) == said


def test_busy_is_an_answer_where_it_says_for_how_long() -> None:
    body = json.dumps(ERROR).encode()
    assert fault([GOOD], 429, BUSY, body) is None
    assert fault([BAD], 429, {"retry-after": "1"}, body) is None
    assert fault([GOOD], 429, {}, body) == "429 without words or time"
    assert fault([GOOD], 429, BUSY, b"{}") == "429 without words or time"
    assert fault([GOOD], 200, {}, b"<html>") == "200 whose body is not JSON"


def test_good_images_are_good_and_bad_ones_bad() -> None:
    for sent in (*images.cells(3), *images.mixed(12)):
        assert sent.good
        assert decode(sent.content).mode == "RGB"
    assert len({sent.content for sent in images.cells(5)}) == 5
    for sent in images.bad():
        assert not sent.good
        with pytest.raises(MambamicError):
            decode(sent.content)


def test_cells_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (5, 5)).save(tmp_path / "one.png")
    (tmp_path / "notes.txt").write_text("not a cell")
    with zipfile.ZipFile(tmp_path / "cells.zip", "w") as archive:
        archive.write(tmp_path / "one.png")
        archive.write(tmp_path / "notes.txt")
    expected = [Sent((tmp_path / "one.png").read_bytes())]
    for place in (tmp_path, tmp_path / "cells.zip"):
        monkeypatch.setenv(images.VARIABLE, str(place))
        assert images.cells(4) == expected
    monkeypatch.setenv(images.VARIABLE, str(tmp_path / "nothing"))
    with pytest.raises(SystemExit, match="no images"):
        images.cells(1)


def test_figures_are_of_each_status() -> None:
    record = Record()
    for number in range(100):
        record.add(200, number / 100, None)
    record.add(429, 5.0, None)
    record.add(0, 9.0, "no answer")
    figures = record.as_json(seconds=10)
    assert figures["statuses"] == {"0": 1, "200": 100, "429": 1}
    assert figures["faults"] == {"no answer": 1}
    assert figures["good_per_second"] == 10
    assert figures["p99_s"] == 0.98
    assert figures["slowest_s"] == 9.0
    assert Record().as_json(1)["p99_s"] is None
