"""Microns per pixel of a slide: whose word counts, and what is too absurd to be true."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mambamic.errors import UsageError

SMALLEST, LARGEST = 0.05, 20.0
_TOLERANCE = 1.01  # a level of 4.0001 for one of 4 is the usual rounding of sizes
_PIXELS_AT_1X = 10.0  # microns per pixel of a 1x objective, by custom: 20x is 0.5, 40x is 0.25
_REMEDY = (
    "state it by --mpp for all, or by a column mpp in --manifest; where microns mean nothing, "
    "--tile-px takes tiles of the slide's own pixels"
)


@dataclass(frozen=True)
class Resolution:
    """Microns per pixel of level 0, and where the number comes from.

    Args:
        mpp: None where nobody knows.
        source: ``manifest``, ``flag``, ``metadata``, ``objective (a guess)`` or ``unknown``.
    """

    mpp: float | None
    source: str


class ResolutionError(UsageError):
    """The microns per pixel of a slide are unknown or absurd, which its user can mend."""


def find_resolution(
    *,
    manifest: float | None,
    flag: float | None,
    metadata: tuple[float, float] | None,
    objective: float | None,
    needed: bool,
) -> Resolution:
    """Decide on the microns per pixel of a slide.

    Args:
        manifest: As the manifest states it for this slide.
        flag: As the command line states it for all.
        metadata: As the file states it, across and down.
        objective: The magnification that the file states.
        needed: Whether tiles are laid out in microns; if not, an unknown or absurd one is no error.

    Raises:
        ResolutionError: It is needed, and unknown or outside 0.05 to 20.
    """
    for value, source in ((manifest, "manifest"), (flag, "flag")):
        if value is not None:
            return Resolution(_checked(value, f"mpp {value:g} (from the {source})"), source)
    try:
        if metadata is not None:
            return Resolution(_of_metadata(*metadata), "metadata")
        if objective is not None and objective > 0:
            guess = _PIXELS_AT_1X / objective
            said = f"mpp {guess:g} (guessed from an objective of {objective:g}x)"
            return Resolution(_checked(guess, said), "objective (a guess)")
        if needed:
            raise ResolutionError(
                "the file states no microns per pixel, and no objective to guess them from",
                f"{SMALLEST} to {LARGEST:g}",
                _REMEDY,
            )
    except ResolutionError:
        if needed:
            raise
    return Resolution(None, "unknown")


def _of_metadata(across: float, down: float) -> float:
    _checked(across, f"mpp {across:.4g} (from the file's metadata)")
    _checked(down, f"mpp {down:.4g} (from the file's metadata)")
    if max(across, down) > 1.1 * min(across, down):
        raise ResolutionError(
            f"mpp {across:.4g} across and {down:.4g} down", "square pixels", _REMEDY
        )
    return math.sqrt(across * down)


def _checked(value: float, said: str) -> float:
    if math.isfinite(value) and SMALLEST <= value <= LARGEST:
        return value
    hint = ", as a resolution of 72 or so dots per inch gives it" if value > 100 else ""
    raise ResolutionError(f"{said}{hint}", f"{SMALLEST} to {LARGEST:g} microns per pixel", _REMEDY)


def best_level(downsamples: tuple[float, ...], ratio: float) -> int:
    """Return the coarsest level that is still at least as fine as asked for.

    Args:
        downsamples: Of each level, against level 0.
        ratio: The asked microns per pixel, over those of level 0.
    """
    fine = [n for n, factor in enumerate(downsamples) if factor <= max(ratio, 1.0) * _TOLERANCE]
    return max(fine, key=lambda n: downsamples[n])
