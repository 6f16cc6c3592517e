"""What one process of a run gives out, writes and leaves to others."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from mambamic.preprocess import Pixels
from mambamic.slides.claims import claim
from mambamic.slides.finish import Finish
from mambamic.slides.inputs import SlideInput
from mambamic.slides.inspection import Inspection, inspect
from mambamic.slides.pipeline import Part, PartScores, run_parts
from mambamic.slides.pool import ReaderPool
from mambamic.slides.run import Run, Task
from mambamic.slides.scorers import Scored
from mambamic.slides.settings import Settings
from mambamic.slides.table import part_path
from mambamic.slides.worker import score_here

from .slide_files import blobs, write_slide
from .test_slides_pipeline import Brightness

MODEL = Brightness()
SETTINGS = Settings(tile=16, stride=16, target_mpp=None, tissue="none")


@pytest.fixture
def seen(tmp_path: Path) -> Inspection:
    """A slide of 1,536 tiles in three parts."""
    path = write_slide(tmp_path / "s.tiff", (768, 512), 1, blobs([(300, 200, 100)]))
    return inspect(SlideInput(path, path.name), MODEL.facts, SETTINGS)


def _run(out: Path, seen: Inspection) -> Run:
    finish = Finish(0.05, csv=False, geojson=False, run={"command": "test", "versions": ""})
    return Run(Task(out, SETTINGS, finish, "test"), [seen], MODEL.facts)


def _number(part: Part | None) -> int | None:
    return None if part is None else part.number


def test_what_another_process_has_is_nothing_yet_and_its_own_is_not_waited_for(
    tmp_path: Path, seen: Inspection
) -> None:
    theirs = claim(tmp_path / seen.folder, "part-1")
    assert theirs is not None
    parts = _run(tmp_path, seen)._parts()
    assert [_number(next(parts)) for _ in range(4)] == [0, 2, None, None]
    theirs.release()
    assert [_number(part) for part in parts] == [1], "and none of its own, which are not done yet"


def test_a_run_waits_for_what_another_has_and_does_it_when_that_dies(
    tmp_path: Path, seen: Inspection
) -> None:
    theirs = claim(tmp_path / seen.folder, "part-1")
    assert theirs is not None
    run = _run(tmp_path, seen)
    with ReaderPool(1, MODEL.batch, 16) as pool:

        def stages(parts: Iterator[Part | None]) -> Iterator[PartScores]:
            for done, result in enumerate(run_parts(parts, pool, MODEL, run.seconds), 1):
                yield result
                if done == 2:
                    theirs.release()

        run.score(stages, {})
    assert run.tiles == 1536
    assert [entry["status"] for entry in run.write_record()] == ["ok"]


def test_as_many_batches_are_scored_at_a_time_as_the_model_takes(
    tmp_path: Path, seen: Inspection
) -> None:
    class Meeting(Brightness):
        """Each call waits until there are four."""

        batch, threads = 16, 4

        def __init__(self) -> None:
            super().__init__()
            self._met = threading.Barrier(4, timeout=10)

        def score(self, tiles: Pixels | Sequence[bytes]) -> Scored:
            self._met.wait()
            return super().score(tiles)

    run = _run(tmp_path, seen)
    score_here(run, Meeting(), readers=1)
    assert run.tiles == 1536


def test_progress_is_of_what_is_left_to_do(tmp_path: Path, seen: Inspection) -> None:
    told: list[tuple[int, int]] = []
    score_here(_run(tmp_path, seen), Brightness(), readers=1)
    part_path(tmp_path / seen.folder, 1).unlink()
    run = _run(tmp_path, seen)
    run.task.progress = lambda done, planned: told.append((done, planned))
    score_here(run, Brightness(), readers=1)
    assert told == [(512, 512)]
