from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mambamic.errors import InferenceError
from mambamic.preprocess import Pixels, Preprocess
from mambamic.slides.pipeline import Part, Seconds, run_parts
from mambamic.slides.plan import Plan
from mambamic.slides.pool import ReaderPool
from mambamic.slides.read import Source
from mambamic.slides.scorers import Scored
from mambamic.slides.settings import PART, ModelFacts

from .slide_files import blobs, write_slide

LOOK = Preprocess(input_size=16)


class Brightness:
    """A model that can be worked out by hand: the mean of each channel."""

    facts = ModelFacts("checkpoint", "b", "b", ("r", "g", "b"), "sigmoid", 16, None, LOOK)
    batch, threads, encoded = 48, 1, False

    def __init__(self, fail_at: int = 10**9) -> None:
        self.calls, self._fail_at = 0, fail_at

    def score(self, tiles: Pixels | Sequence[bytes]) -> Scored:
        self.calls += 1
        if self.calls >= self._fail_at:
            raise InferenceError("the model broke", "one that works", "mend it")
        assert isinstance(tiles, np.ndarray)
        means = (tiles.mean(axis=(1, 2)) / 255).astype(np.float32)
        return Scored(means, means * 2)

    def describe(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "s.tiff"
    return write_slide(path, (2048, 1024), 1, blobs([(900, 500, 400)]))


def _parts(path: Path) -> list[Part]:
    x, y = (
        axis.ravel().astype(np.int64) for axis in np.meshgrid(range(0, 2000, 40), range(0, 990, 40))
    )
    plan = Plan(x, y, np.ones(len(x), np.float32))
    assert plan.parts == 3
    source = Source(path, False, 0, 30, LOOK)
    return [Part(source, plan, number) for number in range(plan.parts)]


@pytest.mark.parametrize("threads", [1, 3])
def test_every_tile_gets_its_own_score(slide: Path, threads: int) -> None:
    model = Brightness()
    model.threads = threads
    seconds = Seconds()
    with ReaderPool(2, model.batch, 16) as pool:
        results = list(run_parts(iter(_parts(slide)), pool, model, seconds))
    assert sorted(result.part.number for result in results) == [0, 1, 2]
    from mambamic.slides.source import open_slide

    opened = open_slide(slide)
    for result in results:
        plan, rows = result.part.plan, result.part.plan.part(result.part.number)
        assert result.bad == 0
        assert len(result.status) == rows.stop - rows.start <= PART
        for at in range(0, len(result.status), 61):
            x, y = int(plan.x[rows][at]), int(plan.y[rows][at])
            mean = LOOK.pixels(opened.read(x, y, 0, (30, 30))).mean(axis=(0, 1)) / 255
            assert result.probabilities[at] == pytest.approx(mean, abs=1e-5)
            assert result.embeddings is not None
            assert result.embeddings[at] == pytest.approx(2 * mean, abs=1e-5)
    opened.close()
    assert seconds.read > 0
    assert seconds.model > 0


def test_a_model_that_fails_ends_the_run_and_all_threads(slide: Path) -> None:
    before = threading.active_count()
    with (
        ReaderPool(2, 48, 16) as pool,
        pytest.raises(InferenceError, match="the model broke"),
    ):
        list(run_parts(iter(_parts(slide)), pool, Brightness(fail_at=4), Seconds()))
    assert threading.active_count() == before


def test_parts_that_fail_end_the_run(slide: Path) -> None:
    def broken() -> Iterator[Part]:
        yield _parts(slide)[0]
        raise OSError("the disk is gone")

    with ReaderPool(1, 48, 16) as pool, pytest.raises(OSError, match="the disk is gone"):
        list(run_parts(broken(), pool, Brightness(), Seconds()))


def test_who_has_enough_can_leave(slide: Path) -> None:
    model = Brightness()
    with ReaderPool(1, 48, 16) as pool:
        results = run_parts(iter(_parts(slide) * 50), pool, model, Seconds())
        next(results)
        results.close()
        done = model.calls
    assert done < 30 * 50


def test_scores_that_are_no_numbers_are_failures(slide: Path) -> None:
    class Overflowing(Brightness):
        def score(self, tiles: Pixels | Sequence[bytes]) -> Scored:
            scored = super().score(tiles)
            scored.probabilities[::3] = np.inf
            return scored

    with ReaderPool(1, 48, 16) as pool:
        (result,) = run_parts(iter(_parts(slide)[:1]), pool, Overflowing(), Seconds())
    bad = [n for n, status in enumerate(result.status) if status != "ok"]
    assert {result.status[n] for n in bad} == {"not_finite"}
    assert len(bad) == result.bad == 10 * 16 + 11, "every third of ten batches of 48 and one of 32"
    assert np.isnan(result.probabilities[bad]).all()
    assert "not finite" in result.messages[bad[0]]


def test_who_waits_for_others_still_hears_of_a_failure(slide: Path) -> None:
    def waiting() -> Iterator[Part | None]:
        yield _parts(slide)[0]
        while True:
            yield None

    before = threading.active_count()
    with ReaderPool(1, 48, 16) as pool, pytest.raises(InferenceError, match="the model broke"):
        list(run_parts(waiting(), pool, Brightness(fail_at=2), Seconds()))
    assert threading.active_count() == before
