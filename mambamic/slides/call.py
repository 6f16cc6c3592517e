"""One call of ``mambamic score``, from its arguments to what it prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from mambamic.errors import DataError, UsageError
from mambamic.machine import usable_cpus
from mambamic.slides.dry import plan_lines
from mambamic.slides.finish import Finish
from mambamic.slides.inputs import find_inputs
from mambamic.slides.inspection import inspect_all
from mambamic.slides.models import ModelChoice
from mambamic.slides.run import INDEX, Run, Task, versions
from mambamic.slides.settings import ModelFacts, Settings, settings_for
from mambamic.slides.worker import device_names, score_here, score_on_devices

if TYPE_CHECKING:
    from mambamic.slides.remote import Server


@dataclass(frozen=True)
class Call:
    """The arguments of ``mambamic score``, see ``cli.score_command``."""

    inputs: Sequence[str]
    out: Path
    model: Path | None = None
    manifest: Path | None = None
    tiles: bool = False
    mpp: float | None = None
    target_mpp: float | None = None
    own_pixels: bool = False
    tile: int | None = None
    stride: int | None = None
    tissue: str = "otsu"
    tissue_file: Path | None = None
    min_tissue: float = 0.1
    workers: int | None = None
    device: str = "auto"
    devices: int = 1
    dtype: str = "auto"
    max_bad: float = 0.05
    dry_run: bool = False
    embeddings: bool = False
    csv: bool = False
    geojson: bool = True
    command: str = "mambamic score"
    head: str | None = None
    trust: bool = False
    server: Server | None = None
    ray: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What a call comes to.

    Args:
        lines: For standard output.
        complaints: For standard error.
        status: For the exit.
    """

    lines: list[str]
    complaints: list[str]
    status: int


def score_slides(call: Call) -> Outcome:
    """Do what a call asks for.

    Raises:
        UsageError: The call is wrong, or slides lack their resolution; nothing was scored.
        MambamicError: The model failed; what was scored is kept.
    """
    if call.model is None:
        raise UsageError("no model", "--model CHECKPOINT", "name a checkpoint's folder")
    choice = ModelChoice(
        call.model, call.device, call.dtype, call.embeddings, call.head, call.trust
    )
    facts = choice.facts()
    inputs, left_out = find_inputs(call.inputs, call.manifest, tiles=call.tiles)
    settings = _settings(call, facts, only_tiles=all(given.tiles for given in inputs))
    slides, copies = inspect_all(inputs, facts, settings)
    if call.dry_run:
        lines, all_well = plan_lines(slides, settings, facts)
        return Outcome(lines, [*left_out, *copies], 0 if all_well else 1)
    # Before anything is written, and before the first of several fails for want of the last.
    devices = device_names(call.device, call.devices) if call.devices > 1 else []
    _make_folder(call.out)
    finish = Finish(call.max_bad, call.csv, call.geojson, _shown(call))
    # None: no bar where standard error is not a terminal.
    with tqdm(unit="tile", delay=2, disable=None, smoothing=0.1) as bar:

        def progress(done: int, planned: int) -> None:
            bar.total = planned
            bar.update(done)

        run = Run(Task(call.out, settings, finish, call.command, progress), slides, facts)
        run.notes += [*left_out, *copies]
        try:
            try:
                _score(call, choice, run, devices)
            finally:
                entries = run.write_record()
        except OSError as error:
            raise DataError(
                f"{error.filename or call.out} ({error.strerror})",
                "an output folder that can be written to, with room",
                "see to it and run again: what is done is kept",
            ) from error
    return _outcome(entries, call.out, run.notes)


def _score(call: Call, choice: ModelChoice, run: Run, devices: Sequence[str]) -> None:
    """Score where the call says: on a server, a cluster, several devices, or here."""
    if call.server is not None:
        from mambamic.slides.remote import ServerScorer

        scorer = ServerScorer(call.server, choice.folder, run.model, embeddings=call.embeddings)
        score_here(run, scorer, _workers(call))
    elif call.ray is not None:
        from mambamic.slides import on_ray

        models = on_ray.connect(call.ray)
        run.score(
            lambda parts: on_ray.run_parts_on_ray(parts, choice, run.model, models, run.seconds),
            {"ray": call.ray, "models": models},
        )
    elif devices:
        score_on_devices(run, [replace(choice, device=name) for name in devices], _workers(call))
    else:
        score_here(run, choice.load(), _workers(call))


def _settings(call: Call, facts: ModelFacts, *, only_tiles: bool) -> Settings:
    if call.tissue_file is not None and not call.tissue_file.exists():
        raise UsageError(
            f"--tissue {str(call.tissue_file)!r}",
            "otsu, none, a mask image, GeoJSON, or a folder of these",
            "check the path",
        )
    return settings_for(
        facts,
        tile=call.tile,
        stride=call.stride,
        # Of what is cut already nobody asks at which resolution.
        own_pixels=call.own_pixels or (only_tiles and call.target_mpp is None),
        target_mpp=call.target_mpp,
        mpp=call.mpp,
        tissue=call.tissue,
        tissue_file=call.tissue_file,
        min_tissue=call.min_tissue,
        embeddings=call.embeddings,
    )


def _workers(call: Call) -> int:
    # One core is the model's on a GPU; on a CPU readers and model share what there is.
    return call.workers or max(1, usable_cpus() - 1)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out {str(out)!r} ({error.strerror})", "a folder to write to", "give another"
        ) from error


def _shown(call: Call) -> dict[str, Any]:
    known = versions()
    return {"command": call.command, "versions": ", ".join(f"{k} {v}" for k, v in known.items())}


def _outcome(entries: Sequence[dict[str, Any]], out: Path, notes: Sequence[str]) -> Outcome:
    """Return a line per slide, and the failures with their reasons."""
    width = max(len(entry["slide"]) for entry in entries)
    lines = []
    for entry in entries:
        if entry["status"] == "failed":
            continue
        tops = sorted(entry["classes"].items(), key=lambda item: -item[1]["tiles"])[:3]
        shares = ", ".join(f"{name} {row['share']:.1%}" for name, row in tops if row["tiles"])
        said = shares if entry["status"] == "ok" else f"{entry['status']}: {entry['reason']}"
        tiles = f"{entry['scored']} of {entry['tiles']} tiles"
        lines.append(f"{entry['slide']:{width}}  {tiles}  {said}")
    failed = [entry for entry in entries if entry["status"] == "failed"]
    complaints = [f"{entry['slide']:{width}}  failed: {entry['reason']}" for entry in failed]
    if failed:
        complaints.append(f"{len(failed)} of {len(entries)} slides failed")
    return Outcome([*lines, str(out / INDEX)], [*notes, *complaints], 1 if failed else 0)
