"""Tiles per second of a slide, end to end, beside what reading alone reaches in the same call.

    python -m benchmarks.slides SLIDE CHECKPOINT --tile 200 --stride 25 --device cuda --workers 15

The slide is read three times by the same readers: for a model that does nothing, through
``mambamic score`` with all it writes, and for nothing again. The rate of reading is the mean of the
two. Seconds of reading and preprocessing are added up over the readers, those of the model are its
own; ``parts`` is up to the last part of the table, ``all`` is with maps, objects and page.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import write
from mambamic.preprocess import Pixels
from mambamic.slides.finish import Finish
from mambamic.slides.inputs import SlideInput
from mambamic.slides.inspection import Inspection, inspect
from mambamic.slides.pipeline import Part, PartScores, Seconds, run_parts
from mambamic.slides.plan import Plan, make_plan
from mambamic.slides.pool import ReaderPool
from mambamic.slides.read import Source
from mambamic.slides.run import Run, Task
from mambamic.slides.scorers import CheckpointScorer, Scored
from mambamic.slides.settings import ModelFacts, settings_for


class Nothing:
    """A model that costs nothing."""

    threads, encoded = 1, False

    def __init__(self, facts: ModelFacts, batch: int) -> None:
        self.facts, self.batch = facts, batch

    def score(self, tiles: Pixels | Sequence[bytes]) -> Scored:
        """Return zeros."""
        return Scored(np.zeros((len(tiles), len(self.facts.classes)), np.float32), None)

    def describe(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def close(self) -> None:
        """Do nothing."""


def read_only(
    seen: Inspection, plan: Plan, facts: ModelFacts, batch: int, workers: int
) -> dict[str, float]:
    """Return how fast the readers are where nobody makes them wait."""
    assert seen.layout is not None
    where = seen.layout
    source = Source(seen.given.path, False, where.level, where.read_size, facts.preprocess)
    parts = iter([Part(source, plan, number) for number in range(plan.parts)])
    seconds = Seconds()
    with ReaderPool(workers, batch, facts.preprocess.input_size) as pool:
        began = time.perf_counter()
        for _ in run_parts(parts, pool, Nothing(facts, batch), seconds):
            pass
        took = time.perf_counter() - began
    return {"tiles_per_s": len(plan) / took, "read_s": seconds.read, "pre_s": seconds.preprocess}


def end_to_end(
    seen: Inspection, args: argparse.Namespace, scorer: CheckpointScorer, settings: Any
) -> dict[str, Any]:
    """Return how fast ``mambamic score`` is, and where its time goes."""
    with tempfile.TemporaryDirectory() as folder:
        task = Task(Path(folder), settings, Finish(0.05, False, True, {}), "benchmark")
        run = Run(task, [seen], scorer.facts)
        parts_s = 0.0
        with ReaderPool(args.workers, scorer.batch, scorer.facts.preprocess.input_size) as pool:
            began = time.perf_counter()

            def stages(parts: Iterator[Part | None]) -> Iterator[PartScores]:
                nonlocal parts_s
                yield from run_parts(parts, pool, scorer, run.seconds)
                parts_s = time.perf_counter() - began

            run.score(stages, scorer.describe())
            all_s = time.perf_counter() - began
        entries = run.write_record()
    assert entries[0]["status"] == "ok", entries[0]["reason"]
    rates = {"tiles_per_s": run.tiles / parts_s, "tiles_per_s_with_pages": run.tiles / all_s}
    return {**rates, "parts_s": parts_s, "all_s": all_s, "seconds": asdict(run.seconds)}


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("slide", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tile", type=int, default=200)
    parser.add_argument("--stride", type=int, default=200)
    parser.add_argument("--tissue", default="none", choices=("none", "otsu"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    scorer = CheckpointScorer(args.checkpoint, args.device, args.dtype, embeddings=False)
    settings = settings_for(
        scorer.facts,
        tile=args.tile,
        stride=args.stride,
        own_pixels=True,
        target_mpp=None,
        tissue=args.tissue,
    )
    seen = inspect(SlideInput(args.slide, args.slide.name), scorer.facts, settings)
    plan = make_plan(seen, settings).plan
    before = read_only(seen, plan, scorer.facts, scorer.batch, args.workers)
    whole = end_to_end(seen, args, scorer, settings)
    after = read_only(seen, plan, scorer.facts, scorer.batch, args.workers)
    reading = (before["tiles_per_s"] + after["tiles_per_s"]) / 2
    results = {
        "slide": args.slide.name,
        "tiles": len(plan),
        "workers": args.workers,
        "model": scorer.describe(),
        "end_to_end": whole,
        "reading_alone": [before, after],
        "share_of_reading_alone": whole["tiles_per_s"] / reading,
    }
    write(results, args.out)


if __name__ == "__main__":
    main()
