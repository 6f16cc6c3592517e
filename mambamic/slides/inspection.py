"""The first look at a slide: what it is, at which resolution, and how it will be cut."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mambamic.errors import MambamicError, SlideError, UsageError
from mambamic.slides.fingerprint import file_digest, slide_fingerprint
from mambamic.slides.grid import Layout, lay_out
from mambamic.slides.inputs import SlideInput
from mambamic.slides.resolution import Resolution, ResolutionError, find_resolution
from mambamic.slides.settings import PART, ModelFacts, Settings
from mambamic.slides.source import SlideInfo, open_slide
from mambamic.slides.tileset import TileSet
from mambamic.slides.tissue import mask_for

_FORMAT = 2  # of what lies in a slide's folder; part of its key
_THREADS = 8


@dataclass(frozen=True)
class Inspection:
    """A slide that can be scored.

    Args:
        given: As the user named it.
        key: Of its content, the model and the settings: 64 hexadecimal digits.
        info: Its header, None for a set of tiles.
        resolution: Microns per pixel of level 0.
        layout: How it is cut, None for a set of tiles.
        mask: The file of its tissue mask, None where there is none.
    """

    given: SlideInput
    key: str
    info: SlideInfo | None
    resolution: Resolution
    layout: Layout | None
    mask: Path | None

    @property
    def folder(self) -> str:
        """Name of the slide's folder: two slides or models never share one."""
        stem = re.sub(r"[^\w.-]+", "_", Path(self.given.name).stem).strip("._") or "slide"
        return f"{stem[:80]}-{self.key[:8]}"

    @property
    def notes(self) -> list[str]:
        """What a person should know before believing the scores."""
        notes = []
        if self.resolution.source.startswith("objective"):
            notes.append(f"{self.resolution.mpp:g} µm per pixel is guessed from the objective")
        if self.layout is not None and self.layout.ratio < 0.9:
            notes.append(
                f"the slide is {1 / self.layout.ratio:.1f} times coarser than the model's tiles, "
                "which are enlarged"
            )
        return notes


@dataclass(frozen=True)
class Refusal:
    """A slide that cannot be scored, and why."""

    given: SlideInput
    error: MambamicError


def inspect_all(
    inputs: Sequence[SlideInput], model: ModelFacts, settings: Settings
) -> tuple[list[Inspection | Refusal], list[str]]:
    """Open every slide once, several at a time.

    Returns:
        What they are, and a line for each that is left out as the copy of another.

    Raises:
        ResolutionError: Slides whose resolution is needed and unknown; all of them are named, and
            nothing was scored yet.
        UsageError: A mask is not there.
    """

    def look(given: SlideInput) -> Inspection | Refusal | ResolutionError:
        try:
            return inspect(given, model, settings)
        except ResolutionError as error:
            return error
        except UsageError:
            raise
        except MambamicError as error:
            return Refusal(given, error)

    with ThreadPoolExecutor(_THREADS, "inspect") as threads:
        looked = threads.map(look, inputs)
        # None: no bar where standard error is not a terminal.
        outcomes = list(tqdm(looked, total=len(inputs), unit="slide", delay=2, disable=None))
    unknown = [
        f"{given.name}: {outcome.problem}"
        for given, outcome in zip(inputs, outcomes, strict=True)
        if isinstance(outcome, ResolutionError)
    ]
    if unknown:
        first = next(outcome for outcome in outcomes if isinstance(outcome, ResolutionError))
        raise ResolutionError("; ".join(unknown), first.expected, first.remedy)
    return _without_twins([o for o in outcomes if not isinstance(o, ResolutionError)])


def inspect(given: SlideInput, model: ModelFacts, settings: Settings) -> Inspection:
    """Open a slide and decide how it is cut.

    Raises:
        SlideError: It cannot be opened.
        ResolutionError: Its microns per pixel are needed, and unknown or absurd.
        UsageError: Its mask cannot be read.
    """
    if given.tiles:
        tiles = TileSet(given.path)
        content = tiles.fingerprint()
        tiles.close()
        resolution = find_resolution(
            manifest=given.mpp, flag=settings.mpp, metadata=None, objective=None, needed=False
        )
        key = _key(content, model, settings, resolution, None)
        return Inspection(given, key, None, resolution, None, None)
    slide = open_slide(given.path)
    slide.close()
    info = slide.info
    resolution = find_resolution(
        manifest=given.mpp,
        flag=settings.mpp,
        metadata=info.mpp,
        objective=info.objective,
        needed=settings.target_mpp is not None,
    )
    ratio = 1.0
    if settings.target_mpp is not None:
        assert resolution.mpp is not None
        ratio = settings.target_mpp / resolution.mpp
    layout = lay_out(info, settings.tile, settings.stride, ratio, level=settings.level)
    mask = given.mask
    if mask is None and settings.tissue_file is not None:
        mask = mask_for(settings.tissue_file, given.path)
    try:
        content = slide_fingerprint(given.path, info.quickhash)
    except OSError as error:
        raise SlideError(
            f"{given.path} ({error.strerror})", "a readable file", "check it"
        ) from error
    key = _key(content, model, settings, resolution, mask)
    return Inspection(given, key, info, resolution, layout, mask)


def _key(
    content: str,
    model: ModelFacts,
    settings: Settings,
    resolution: Resolution,
    mask: Path | None,
) -> str:
    try:
        tissue = settings.tissue if mask is None else file_digest(mask)
    except OSError as error:
        raise UsageError(f"the mask {mask} ({error.strerror})", "a file", "check it") from error
    ingredients: dict[str, Any] = {
        "format": _FORMAT,
        "part": PART,
        "content": content,
        "model": model.identity,
        # It is in the table even where tiles are laid out in pixels; whose word it is is not.
        "mpp": resolution.mpp,
        "tissue": tissue,
        **settings.as_json(),
    }
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def _without_twins(
    outcomes: Sequence[Inspection | Refusal],
) -> tuple[list[Inspection | Refusal], list[str]]:
    """Leave out what is the same slide again: DICOM has a file per level, and copies happen."""
    seen: dict[tuple[object, ...], Inspection] = {}
    kept: list[Inspection | Refusal] = []
    left_out = []
    for outcome in outcomes:
        if isinstance(outcome, Refusal):
            kept.append(outcome)
            continue
        info, given = outcome.info, outcome.given
        dicom = info is not None and info.format == "dicom" and info.quickhash is not None
        # By its own name a copy would have the folder of the first.
        identity: tuple[object, ...] = (outcome.folder,)
        if dicom and info is not None:
            identity = (info.quickhash, outcome.mask, outcome.resolution.mpp)
        first = seen.setdefault(identity, outcome)
        if first is outcome:
            kept.append(outcome)
        elif not dicom:
            left_out.append(f"{given.path}: left out, it is a copy of {first.given.path}")
    return kept, left_out
