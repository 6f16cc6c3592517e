"""What a run is to do, and what it knows of its model: the same for every slide."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambamic.errors import UsageError
from mambamic.preprocess import Preprocess

PART = 512  # tiles in a file of the table: what a kill can cost, at most, per part under way


@dataclass(frozen=True)
class ModelFacts:
    """What a run has to know of a model before it opens a slide.

    Args:
        kind: ``checkpoint`` or ``wsinfer``.
        name: For people.
        identity: The same only for models that give the same scores.
        classes: In the order of the scores.
        head: ``softmax`` or ``sigmoid``.
        tile: Side of the tiles that it was trained on, in pixels.
        mpp: Microns per pixel that these had, None where unknown.
        preprocess: From a tile to the model's input.
    """

    kind: str
    name: str
    identity: str
    classes: tuple[str, ...]
    head: str
    tile: int
    mpp: float | None
    preprocess: Preprocess


@dataclass(frozen=True)
class Settings:
    """What a run is to do.

    Args:
        tile: Side of a tile, in pixels of ``target_mpp``.
        stride: From one tile to the next, in the same pixels.
        target_mpp: Microns per pixel at which the model sees tiles; None for a slide's own pixels.
        mpp: Of all slides for which the manifest states none; None to believe the files.
        tissue: ``otsu`` or ``none``.
        tissue_file: A mask for all slides, or a folder of masks; None for ``tissue``.
        min_tissue: Tiles with a smaller share of tissue are left out.
        embeddings: Whether to keep what the network's head sees.
        level: Read this level, whatever is best; to measure what the choice is worth.
    """

    tile: int
    stride: int
    target_mpp: float | None
    mpp: float | None = None
    tissue: str = "otsu"
    tissue_file: Path | None = None
    min_tissue: float = 0.1
    embeddings: bool = False
    level: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return what decides on the scores, as JSON; masks and microns are each slide's own."""
        return {
            "tile": self.tile,
            "stride": self.stride,
            "target_mpp": self.target_mpp,
            "min_tissue": self.min_tissue,
            "embeddings": self.embeddings,
            "level": self.level,
        }


def settings_for(
    model: ModelFacts,
    *,
    tile: int | None,
    stride: int | None,
    own_pixels: bool,
    target_mpp: float | None,
    **others: Any,
) -> Settings:
    """Fill in what the user left to the model.

    Args:
        model: Whose tile and resolution are the defaults.
        tile: As the user stated it.
        stride: As the user stated it; by default tiles neither overlap nor leave gaps.
        own_pixels: Take tiles of the slides' own pixels, whatever their size in microns.
        target_mpp: As the user stated it.
        others: The other fields of ``Settings``.

    Raises:
        UsageError: Nobody states at which resolution the model works.
    """
    side = tile or model.tile
    if own_pixels:
        if target_mpp is not None:
            raise UsageError("--tile-px and --target-mpp", "one of them", "leave one out")
        return Settings(side, stride or side, None, **others)
    asked = target_mpp or model.mpp
    if asked is None:
        raise UsageError(
            f"the model {model.name!r} does not state the microns per pixel of its tiles",
            "the resolution at which it is to see the slides",
            "give it by --target-mpp, or take tiles of the slides' own pixels by --tile-px",
        )
    return Settings(side, stride or side, asked, **others)
