"""What of a Ray run needs no cluster; ``e2e/test_slides_ray.py`` has one."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mambamic.errors import ServerError
from mambamic.preprocess import Preprocess
from mambamic.slides.pipeline import Part, PartScores, Seconds
from mambamic.slides.plan import Plan
from mambamic.slides.read import Failure, Source


def _part(count: int = 4) -> Part:
    corners = np.zeros(count, np.int64)
    plan = Plan(corners, corners, np.ones(count, np.float32))
    return Part(Source(Path("s"), False, 0, 30, Preprocess(input_size=16)), plan, 0)


@pytest.fixture
def on_ray() -> ModuleType:
    """Imported late: Ray takes a second, in each process that only collects these tests too."""
    return importlib.import_module("mambamic.slides.on_ray")


def test_rows_become_scores_or_say_why_not(on_ray: ModuleType) -> None:
    result = PartScores.blank(_part(), 2)
    row = {
        "start": 0,
        "probabilities": np.array([[0.9, 0.1], [np.nan] * 2, [np.nan] * 2, [0.3, 0.7]]),
        "embeddings": np.ones((4, 3), np.float32),
        "failures": json.dumps([Failure(2, "unreadable", "no pixels")]),
        "seconds": np.ones(3),
    }
    seconds = Seconds()
    on_ray._add(result, row, seconds)
    assert result.status == ["ok", "not_finite", "unreadable", "ok"]
    assert result.messages[2] == "no pixels"
    assert result.probabilities[3].tolist() == pytest.approx([0.3, 0.7])
    assert result.embeddings is not None
    assert np.isnan(result.embeddings).all(axis=1).tolist() == [False, True, True, False]
    assert (result.missing, seconds.model) == (0, 1)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1", "nowhere.invalid:6379"])
def test_a_cluster_that_is_not_there_is_given_up_at_once(
    on_ray: ModuleType, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray.ray, "init", lambda **_: pytest.fail("Ray would try for minutes"))
    with pytest.raises(ServerError, match=f"{address} cannot be joined .*HOST:PORT"):
        on_ray.connect(address)


def test_no_part_waits_in_a_wave_while_others_wait_for_it(on_ray: ModuleType) -> None:
    one, two, three = (_part() for _ in range(3))
    waves = on_ray._waves(iter([one, two, None, None, three]))
    assert list(waves) == [[one, two], [three]]
