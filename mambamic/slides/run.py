"""A run: every slide planned, its missing parts scored, and what became of each written down."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import BaseFileLock

from mambamic._version import __version__
from mambamic.errors import MambamicError, SlideError
from mambamic.slides.claims import claim
from mambamic.slides.files import read_json, write_json
from mambamic.slides.finish import Finish
from mambamic.slides.inspection import Inspection, Refusal
from mambamic.slides.pipeline import Part, PartScores, Seconds
from mambamic.slides.plan import Plan, make_plan, read_plan, write_plan
from mambamic.slides.read import Source
from mambamic.slides.report import write_index
from mambamic.slides.settings import ModelFacts, Settings
from mambamic.slides.summary import SUMMARY
from mambamic.slides.table import Geometry, part_path, write_part, written

Stages = Callable[[Iterator[Part | None]], Iterator[PartScores]]
RUN, INDEX = "run.json", "report.html"


@dataclass
class SlideWork:
    """A slide that this run works on.

    Args:
        seen: What it is.
        folder: Where its results lie.
        plan: Its tiles, once they are known.
        failure: Why it was given up.
        bad: Tiles without scores, of the parts that this run scored.
        under_way: Parts that this run gave out and has not written yet.
        given_out: Whether no more parts of it will be.
    """

    seen: Inspection
    folder: Path
    plan: Plan | None = None
    failure: MambamicError | None = None
    bad: int = 0
    under_way: set[int] = field(default_factory=set)
    given_out: bool = False

    @property
    def geometry(self) -> Geometry:
        """What is the same for all its tiles."""
        seen = self.seen
        if seen.layout is None or seen.info is None:
            return Geometry(seen.given.name, None, 0, seen.resolution.mpp)
        factor = seen.info.downsamples[seen.layout.level]
        mpp = None if seen.resolution.mpp is None else seen.resolution.mpp * factor
        return Geometry(seen.given.name, seen.layout.size, seen.layout.level, mpp)

    def source(self, model: ModelFacts, encode: bool) -> Source:
        """Return where its tiles come from."""
        layout = self.seen.layout
        return Source(
            path=self.seen.given.path,
            tiles_are_files=layout is None,
            level=0 if layout is None else layout.level,
            read_size=0 if layout is None else layout.read_size,
            preprocess=model.preprocess,
            encode=encode,
        )


@dataclass
class Task:
    """What a run is to do.

    Args:
        out: Folder of the results.
        settings: The same for every slide.
        finish: What is made of each table.
        command: The call, for the record.
        progress: Told how many tiles were scored, and of how many.
    """

    out: Path
    settings: Settings
    finish: Finish
    command: str
    progress: Callable[[int, int], None] | None = None


@dataclass(frozen=True)
class Share:
    """What one process of a run has done, for the one that started it.

    Args:
        tiles: That it scored.
        seconds: Where its time went.
        in_use: What it used.
        failures: Why it gave slides up, by their folder.
    """

    tiles: int
    seconds: Seconds
    in_use: dict[str, Any]
    failures: dict[str, MambamicError]


class Run:
    """The part of a run that one process does; any number may share its folder."""

    def __init__(
        self, task: Task, slides: Sequence[Inspection | Refusal], model: ModelFacts
    ) -> None:
        self.task = task
        self.model = model
        self.slides = slides
        self.work = [
            SlideWork(seen, task.out / seen.folder)
            for seen in slides
            if isinstance(seen, Inspection)
        ]
        self.seconds = Seconds()
        self.notes: list[str] = []  # of what went otherwise than asked for, and cost no slide
        self.tiles = 0
        self._planned = 0
        self._started = _now()
        self._began = time.perf_counter()
        self._describe: dict[str, Any] = {}
        self._encoded = False
        self._finishing: list[tuple[SlideWork, Future[None]]] = []

    def score(self, stages: Stages, describe: dict[str, Any], *, encoded: bool = False) -> None:
        """Score what is missing of every slide, and finish those that are complete.

        Args:
            stages: From parts to their scores.
            describe: What is in use, for the record.
            encoded: Whether the model takes PNG files.

        Raises:
            MambamicError: The model or the server failed; what was written stays.
        """
        self._describe, self._encoded = describe, encoded
        with ThreadPoolExecutor(2, "finish") as self._finishers:
            for result in stages(self._parts()):
                self._take(result)
            for work in self.work:
                self._finish_if_complete(work)
        for work, future in self._finishing:
            error = future.exception()
            if isinstance(error, MambamicError):
                work.failure = error
            elif error is not None:
                raise error

    def _parts(self) -> Iterator[Part | None]:
        """Give out the parts that are missing, planning one slide ahead.

        None stands for nothing yet: all that is missing is at work, here or in other processes.
        Whoever takes the parts knows how to wait, and what to do meanwhile.
        """
        with ThreadPoolExecutor(1, "plan") as planner:
            plans = [planner.submit(self._plan, work) for work in self.work[:1]]
            for number, work in enumerate(self.work):
                if number + 1 < len(self.work):
                    plans.append(planner.submit(self._plan, self.work[number + 1]))
                plans[number].result()
                yield from self._free_parts(work)
        # What other processes have is done when they are, or free again if they die.
        while any(not work.given_out for work in self.work):
            yield None
            for work in self.work:
                yield from self._free_parts(work)

    def _plan(self, work: SlideWork) -> None:
        try:
            plan = read_plan(work.folder, work.seen.key)
            if plan is None:
                lock = claim(work.folder, "plan", wait=True)
                assert lock is not None
                with lock:
                    plan = read_plan(work.folder, work.seen.key)
                    if plan is None:
                        planned = make_plan(work.seen, self.task.settings)
                        write_plan(work.folder, work.seen, planned, self.model)
                        plan = planned.plan
            work.plan = plan
            there = (plan.part(number) for number in written(work.folder, plan.parts))
            self._planned += len(plan) - sum(rows.stop - rows.start for rows in there)
        except MambamicError as error:
            work.failure = error

    def _free_parts(self, work: SlideWork) -> Iterator[Part]:
        """Give out the parts of a slide that are missing and that nobody has."""
        plan = work.plan
        if plan is None or work.given_out:
            work.given_out = True
            return
        theirs = False
        for number in range(plan.parts):
            if work.failure is not None:
                break
            # In this order: what leaves the set is written by then.
            if number in work.under_way or part_path(work.folder, number).exists():
                continue
            lock = claim(work.folder, f"part-{number}")
            if lock is None:
                theirs = True
            elif part_path(work.folder, number).exists():
                lock.release()
            else:
                work.under_way.add(number)
                yield Part(work.source(self.model, self._encoded), plan, number, (work, lock))
        work.given_out = work.failure is not None or not theirs

    def _take(self, result: PartScores) -> None:
        work, lock = result.part.note
        assert isinstance(work, SlideWork)
        assert isinstance(lock, BaseFileLock)
        assert work.plan is not None
        work.bad += result.bad
        too_many = work.bad > self.task.finish.max_bad * len(work.plan)
        if too_many and result.unread == len(result.status):
            # Nothing can be read any more: the disk or the network is gone, or the file is.
            # Written down this would stay; so it is left for another run to try.
            reason = next(iter(result.messages.values()))
            work.failure = SlideError(
                f"no tile of a part of {len(result.status)} can be read ({reason})",
                f"at most {self.task.finish.max_bad:.1%} such tiles",
                "check the file and where it lies, then run again: what is done is kept",
            )
        else:
            began = time.perf_counter()
            write_part(
                work.folder,
                result,
                work.geometry,
                self.model.classes,
                self._describe,
                embeddings=self.task.settings.embeddings,
            )
            self.seconds.write += time.perf_counter() - began
            self.tiles += len(result.status)
        lock.release()
        work.under_way.remove(result.part.number)
        self.count(len(result.status), self._planned)
        if work.given_out and not work.under_way:
            self._finish_if_complete(work)

    def count(self, tiles: int, planned: int) -> None:
        """Tell whoever watches that more tiles were scored, and how many were found so far."""
        if self.task.progress is not None:
            self.task.progress(tiles, planned)

    def share(self) -> Share:
        """Return what this process has done."""
        failures = {w.seen.folder: w.failure for w in self.work if w.failure is not None}
        return Share(self.tiles, self.seconds, self._describe, failures)

    def take_over(self, share: Share) -> None:
        """Count what another process has done for this run."""
        self.tiles += share.tiles
        for name in (entry.name for entry in fields(Seconds)):
            spent = getattr(self.seconds, name) + getattr(share.seconds, name)
            setattr(self.seconds, name, spent)
        self._describe = share.in_use
        for work in self.work:
            work.failure = work.failure or share.failures.get(work.seen.folder)

    def is_complete(self) -> bool:
        """Tell whether every slide has come to an end, good or bad."""
        return all(
            work.failure is not None or self.task.finish.is_done(read_json(work.folder / SUMMARY))
            for work in self.work
        )

    def _finish_if_complete(self, work: SlideWork) -> None:
        if work.plan is None or work.failure or any(work is known for known, _ in self._finishing):
            return
        if len(written(work.folder, work.plan.parts)) == work.plan.parts:
            self._finishing.append((work, self._finishers.submit(self._finish, work)))

    def _finish(self, work: SlideWork) -> None:
        lock = claim(work.folder, "finish", wait=True)
        assert lock is not None
        with lock:
            if self.task.finish.is_done(read_json(work.folder / SUMMARY)):
                return
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "mambamic.slides.finish", str(work.folder)],
                input=json.dumps(asdict(self.task.finish)),
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
            self.seconds.write += time.perf_counter() - began
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise SlideError(
                f"maps and page could not be made ({said[-1] if said else done.returncode})",
                "an output folder that can be written to",
                "see to it and run again: the scores are kept",
            )

    def entries(self) -> list[dict[str, Any]]:
        """Return what became of every slide, in the order in which they were named."""
        entries: list[dict[str, Any]] = []
        works = {work.seen.folder: work for work in self.work}
        for seen in self.slides:
            if isinstance(seen, Refusal):
                entries.append(_failed(seen.given.name, str(seen.given.path), seen.error, None))
                continue
            work = works[seen.folder]
            summary = read_json(work.folder / SUMMARY)
            if work.failure is not None or summary is None:
                error = work.failure or SlideError("not complete", "all parts", "run again")
                entries.append(_failed(seen.given.name, str(seen.given.path), error, seen.folder))
            else:
                entries.append({**summary, "folder": seen.folder})
        return entries

    def write_record(self) -> list[dict[str, Any]]:
        """Write ``run.json`` and the page over all slides; return what became of each."""
        entries = self.entries()
        record = {
            "command": self.task.command,
            "started": self._started,
            "ended": _now(),
            "host": socket.gethostname(),
            "versions": versions(),
            "model": {**asdict(self.model), "in_use": self._describe},
            "settings": asdict(self.task.settings),
            "tiles_scored_by_this_run": self.tiles,
            "seconds": {"elapsed": time.perf_counter() - self._began, **asdict(self.seconds)},
            "notes": self.notes,
            "failed": [
                {"slide": entry["slide"], "path": entry["path"], "reason": entry["reason"]}
                for entry in entries
                if entry["status"] == "failed"
            ],
            "slides": [_short(entry) for entry in entries],
        }
        record = json.loads(json.dumps(record, default=str))
        write_json(self.task.out / RUN, record)
        write_index(self.task.out / INDEX, entries, record)
        return entries


def _failed(name: str, path: str, error: MambamicError, folder: str | None) -> dict[str, Any]:
    return {
        "slide": name,
        "path": path,
        "status": "failed",
        "reason": str(error),
        "folder": None,
    } | ({} if folder is None else {"incomplete": folder})


def _short(entry: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is long and in the slide's own summary."""
    return {key: value for key, value in entry.items() if key != "failures"}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of everything that has a say in the scores."""
    names = ("numpy", "openslide-bin", "openslide-python", "pillow", "tiffslide", "torch")
    used = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            used[name] = version(name)
    return {"mambamic": __version__, "python": platform.python_version(), **used}
