"""The same stages on a Ray cluster: readers as tasks, one model per GPU as an actor.

Ray Data streams batches of tiles from the ones to the others and bounds what is under way; a task
or actor that is lost is run again. The driver alone writes, by the same code as a local run, so the
table is the same. Slides, model and results lie where all machines see them under the same paths.
"""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import ray
import ray.data

from mambamic.errors import ServerError
from mambamic.slides.models import ModelChoice
from mambamic.slides.pipeline import WAIT_S, Part, PartScores, Seconds
from mambamic.slides.read import Failure, Place, Source, TileReader
from mambamic.slides.scorers import Scored
from mambamic.slides.settings import ModelFacts

_WAVE = 128  # parts that are claimed at a time: each holds a file open
_TILES = 64  # that travel together


def connect(address: str) -> int:
    """Join a cluster.

    Args:
        address: ``HOST:PORT`` of its head, or ``auto`` for the one of this machine.

    Returns:
        How many models it is to have: one per GPU, or one per machine where there is none.

    Raises:
        ServerError: It cannot be reached.
    """
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise ServerError(
            f"the Ray cluster {address} cannot be joined ({str(error).splitlines()[0]})",
            "HOST:PORT of a head that is up, of the same versions of Python and Ray",
            "start one by: ray start --head",
        ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    alive = sum(node["Alive"] for node in ray.nodes())
    return int(ray.cluster_resources().get("GPU", 0)) or alive


def _knock(address: str) -> None:
    """Raise where nobody listens: Ray itself would try for many minutes."""
    if address != "auto":
        host, _, port = address.removeprefix("ray://").rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def run_parts_on_ray(
    parts: Iterator[Part | None],
    choice: ModelChoice,
    facts: ModelFacts,
    models: int,
    seconds: Seconds,
) -> Iterator[PartScores]:
    """Score parts on the cluster; they come back when they are done, in any order.

    Args:
        parts: Taken in waves; None where there is nothing yet, but may be later.
        choice: The model, which every actor loads.
        facts: Of the model.
        models: Actors.
        seconds: To which the times are added.
    """
    for wave in _waves(parts):
        yield from _run_wave(wave, choice, facts, models, seconds)


def _waves(parts: Iterator[Part | None]) -> Iterator[list[Part]]:
    wave = []
    for part in parts:
        if part is not None:
            wave.append(part)
        # Another process may be waiting for what is claimed here: none is held back for company.
        if wave and (part is None or len(wave) == _WAVE):
            yield wave
            wave = []
        elif part is None:
            time.sleep(WAIT_S)
    if wave:
        yield wave


def _run_wave(
    wave: list[Part], choice: ModelChoice, facts: ModelFacts, models: int, seconds: Seconds
) -> Iterator[PartScores]:
    items, results = [], []
    for number, part in enumerate(wave):
        places = part.places()
        results.append(PartScores.blank(part, len(facts.classes)))
        items += [
            {"part": number, "start": start, "places": json.dumps(places[start : start + _TILES])}
            for start in range(0, len(places), _TILES)
        ]
    # Stated apart, or Ray would let the few that have a model do the reading too.
    gpus = {"num_gpus": 1} if ray.cluster_resources().get("GPU", 0) else {"num_cpus": 0.25}
    scored = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map(cast(Any, _read), fn_args=([part.source for part in wave],), num_cpus=0.5)
        .map(
            cast(Any, _Model),  # Ray's annotations know neither classes nor further arguments
            fn_constructor_args=(choice,),
            compute=ray.data.ActorPoolStrategy(size=models),
            **gpus,
        )
    )
    seen = set()
    for row in scored.iter_rows():
        which = row["part"], row["start"]
        # A task that ran twice, because its answer was lost, counts once.
        if which in seen:
            continue
        seen.add(which)
        result = results[row["part"]]
        _add(result, row, seconds)
        if not result.missing:
            yield result


def _read(row: dict[str, Any], sources: list[Source]) -> dict[str, Any]:
    """Read the tiles of a row; runs anywhere in the cluster."""
    source = sources[row["part"]]
    size = source.preprocess.input_size
    given = (Place(*fields) for fields in json.loads(row["places"]))
    places = [place._replace(at=at) for at, place in enumerate(given)]
    pixels = np.zeros((len(places), size, size, 3), np.uint8)
    reader = TileReader()
    report = reader.read(source, places, pixels)
    reader.close()
    return {
        "part": row["part"],
        "start": row["start"],
        "pixels": pixels,
        "failures": json.dumps(report.failures),
        "seconds": np.array([report.read_s, report.preprocess_s]),
    }


class _Model:
    """An actor: a model, loaded once."""

    def __init__(self, choice: ModelChoice) -> None:
        self._scorer = choice.load()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        pixels = np.array(row.pop("pixels"))
        failed = {failure[0] for failure in json.loads(row["failures"])}
        good = [n for n in range(len(pixels)) if n not in failed]
        probabilities = np.full((len(pixels), len(self._scorer.facts.classes)), np.nan, np.float32)
        embeddings = np.zeros((len(pixels), 0), np.float32)
        began = time.perf_counter()
        if good:
            scored = self._scorer.score(pixels[good])
            probabilities[good] = scored.probabilities
            if scored.embeddings is not None:
                width = scored.embeddings.shape[1]
                embeddings = np.full((len(pixels), width), np.nan, np.float32)
                embeddings[good] = scored.embeddings
        took = np.append(row["seconds"], time.perf_counter() - began)
        scores = {"probabilities": probabilities, "embeddings": embeddings}
        return {**row, **scores, "seconds": took}


def _add(result: PartScores, row: dict[str, Any], seconds: Seconds) -> None:
    start, probabilities = row["start"], np.asarray(row["probabilities"])
    embeddings = np.asarray(row["embeddings"])
    failures = [Failure(*fields) for fields in json.loads(row["failures"])]
    failed = {failure.at for failure in failures}
    good = [n for n in range(len(probabilities)) if n not in failed]
    scored = Scored(probabilities[good], embeddings[good] if embeddings.shape[1] else None)
    result.add([start + n for n in good], scored)
    for failure in failures:
        result.fail(failure._replace(at=start + failure.at))
    result.missing -= len(probabilities)
    read, preprocess, model = (float(spent) for spent in row["seconds"])
    seconds.read += read
    seconds.preprocess += preprocess
    seconds.model += model
