"""Parts of slides through readers and model to scores, with each of these always at work.

Three kinds of threads, tied by queues that cannot grow: one takes parts from the caller's iterator
and gives their batches to the readers, one or more score what is ready, and the caller's own takes
the results. Memory is bounded by the readers' and by the few results that wait.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mambamic.slides.plan import Plan
from mambamic.slides.pool import Batch, ReaderPool
from mambamic.slides.read import DIED, OK, UNREADABLE, Failure, Place, Source
from mambamic.slides.scorers import Scored, Scorer

_POLL_S = 0.05  # until a thread sees that it is to end: each end of a run waits for that
_RESULTS = 8  # parts that wait for the caller
WAIT_S = 1.0  # for parts that another process has
REFUSED, NOT_FINITE = "refused", "not_finite"
_NOT_FINITE = (
    "the model's probabilities for this tile are not finite: see whether its weights are damaged, "
    "or try --dtype float32"
)


@dataclass
class Part:
    """A part of a slide's table, on its way.

    Args:
        source: The slide.
        plan: Its tiles.
        number: Which part.
        note: Whatever the caller wants to have back with it.
    """

    source: Source
    plan: Plan
    number: int
    note: Any = None

    def places(self) -> list[Place]:
        """Return the tiles, numbered within the part."""
        rows = self.plan.part(self.number)
        return self.plan.places(range(rows.start, rows.stop))


@dataclass
class Seconds:
    """Where the time went. Readers' and model's seconds run side by side."""

    read: float = 0.0
    preprocess: float = 0.0
    model: float = 0.0
    write: float = 0.0
    waiting_for_tiles: float = 0.0


@dataclass
class PartScores:
    """Scores of a part, in the order of the plan.

    Args:
        part: Which.
        probabilities: (N, classes), NaN for tiles without scores.
        embeddings: (N, C), None where none were asked for.
        status: (N,) ``ok`` or the failure.
        messages: Of the failures, by row.
    """

    part: Part
    probabilities: NDArray[np.float32]
    embeddings: NDArray[np.float32] | None = None
    status: list[str] = field(default_factory=list)
    messages: dict[int, str] = field(default_factory=dict)
    missing: int = 0

    @classmethod
    def blank(cls, part: Part, classes: int) -> PartScores:
        """Return those of a part of which nothing is scored yet."""
        rows = part.plan.part(part.number)
        count = rows.stop - rows.start
        scores = np.full((count, classes), np.nan, np.float32)
        return cls(part, scores, status=[OK] * count, missing=count)

    @property
    def bad(self) -> int:
        """Number of tiles without scores."""
        return sum(status != OK for status in self.status)

    @property
    def unread(self) -> int:
        """Number of tiles whose pixels could not be had."""
        return sum(status in (UNREADABLE, DIED) for status in self.status)

    def add(self, rows: list[int], scored: Scored) -> None:
        """Take the scores of some rows; those that are no numbers are failures."""
        self.probabilities[rows] = scored.probabilities
        if scored.embeddings is not None:
            if self.embeddings is None:
                shape = len(self.status), scored.embeddings.shape[1]
                self.embeddings = np.full(shape, np.nan, np.float32)
            self.embeddings[rows] = scored.embeddings
        for place in np.flatnonzero(~np.isfinite(scored.probabilities).all(axis=1)).tolist():
            self.fail(Failure(rows[place], NOT_FINITE, _NOT_FINITE))
        # The scores of these are blank.
        for place, message in scored.refused.items():
            self.fail(Failure(rows[place], REFUSED, message))

    def fail(self, failure: Failure) -> None:
        """Note a tile without scores."""
        self.status[failure.at] = failure.status
        self.messages[failure.at] = failure.message
        self.probabilities[failure.at] = np.nan
        if self.embeddings is not None:
            self.embeddings[failure.at] = np.nan


def run_parts(
    parts: Iterator[Part | None], pool: ReaderPool, scorer: Scorer, seconds: Seconds
) -> Generator[PartScores, None, None]:
    """Score parts; they come back when they are done, in an order that may be another.

    Args:
        parts: Taken one by one, in a thread of its own, a little ahead of the scores; None where
            there is nothing yet, but may be later.
        pool: The readers.
        scorer: The model.
        seconds: To which the times are added.

    Raises:
        Exception: Whatever went wrong in one of the threads.
    """
    line = _Line(pool, scorer, seconds)
    threads = [threading.Thread(target=line.feed, args=(parts,), name="feed")]
    threads += [
        threading.Thread(target=line.score, name=f"score-{n}") for n in range(scorer.threads)
    ]
    for thread in threads:
        thread.start()
    try:
        while (result := line.next_result()) is not None:
            yield result
    except BaseException:
        line.stop.set()
        scorer.close()  # a thread may be waiting for a server that is gone
        raise
    finally:
        line.stop.set()
        for thread in threads:
            thread.join()


class _Line:
    def __init__(self, pool: ReaderPool, scorer: Scorer, seconds: Seconds) -> None:
        self.stop = threading.Event()
        self._pool, self._scorer, self._seconds = pool, scorer, seconds
        self._results: queue.Queue[PartScores] = queue.Queue(_RESULTS)
        self._lock = threading.Lock()
        self._under_way = 0
        self._fed = False
        self._failure: BaseException | None = None

    def feed(self, parts: Iterator[Part | None]) -> None:
        """Give out the batches of all parts."""
        with self._reporting():
            for part in parts:
                if part is None:
                    if self.stop.wait(WAIT_S):
                        return
                    continue
                places = part.places()
                result = PartScores.blank(part, len(self._scorer.facts.classes))
                with self._lock:
                    self._under_way += 1
                for start in range(0, len(places), self._scorer.batch):
                    some = places[start : start + self._scorer.batch]
                    here = [place._replace(at=n) for n, place in enumerate(some)]
                    batch = Batch(part.source, here, (result, start))
                    while not self._pool.submit(batch, _POLL_S):
                        if self.stop.is_set():
                            return
                if self.stop.is_set():
                    return
            with self._lock:
                self._fed = True

    def score(self) -> None:
        """Score what the readers have ready."""
        with self._reporting():
            while not self.stop.is_set():
                began = time.perf_counter()
                try:
                    batch = self._pool.ready.get(timeout=_POLL_S)
                except queue.Empty:
                    batch = None
                with self._lock:
                    self._seconds.waiting_for_tiles += time.perf_counter() - began
                if batch is not None:
                    self._score(batch)

    def _score(self, batch: Batch) -> None:
        result, start = batch.note
        failed = {failure.at for failure in batch.report.failures}
        good = [n for n in range(len(batch.places)) if n not in failed]
        began = time.perf_counter()
        scored = self._scores(batch, good)
        took = time.perf_counter() - began
        self._pool.release(batch)
        with self._lock:
            self._seconds.model += took
            self._seconds.read += batch.report.read_s
            self._seconds.preprocess += batch.report.preprocess_s
            if scored is not None:
                result.add([start + n for n in good], scored)
            for failure in batch.report.failures:
                result.fail(failure._replace(at=start + failure.at))
            result.missing -= len(batch.places)
            done = result.missing == 0
        while done and not self.stop.is_set():
            with contextlib.suppress(queue.Full):
                self._results.put(result, timeout=_POLL_S)
                return

    def _scores(self, batch: Batch, good: list[int]) -> Scored | None:
        if not good:
            return None
        if batch.source.encode:
            return self._scorer.score([batch.report.files[n] for n in good])
        pixels = self._pool.pixels(batch)
        return self._scorer.score(pixels if len(good) == len(pixels) else pixels[good])

    def next_result(self) -> PartScores | None:
        """Return a part that is done, None when all are."""
        while True:
            failure = self._failure or self._pool.failure
            if failure is not None:
                raise failure
            with self._lock:
                if self._fed and not self._under_way:
                    return None
            with contextlib.suppress(queue.Empty):
                result = self._results.get(timeout=_POLL_S)
                with self._lock:
                    self._under_way -= 1
                return result

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        # It is raised in the caller's thread, where someone can act on it.
        except BaseException as error:
            self._failure = error
            self.stop.set()
