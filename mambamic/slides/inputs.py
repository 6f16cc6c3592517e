"""What is to be scored: files, folders, patterns and a manifest, as one list without doubles."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mambamic.errors import UsageError
from mambamic.slides.files import is_results

# What OpenSlide and TiffSlide read, then plain images. A folder is searched for these.
SLIDE_SUFFIXES = frozenset(
    (".svs", ".svslide", ".ndpi", ".scn", ".mrxs", ".vms", ".vmu", ".bif", ".dcm", ".tif", ".tiff")
)
IMAGE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".jp2", ".ppm", ".gif", ".avif")
)
_CHECK = "check the path"


@dataclass(frozen=True)
class SlideInput:
    """One slide, or one set of tiles, as the user named it.

    Args:
        path: The file; of a set of tiles the folder or ZIP.
        name: How tables and pages call it: the manifest's id, or the file's name.
        mpp: Microns per pixel from the manifest.
        mask: A tissue mask from the manifest: an image or GeoJSON.
        tiles: Whether every image in ``path`` is one tile.
        listed: Whether a manifest names it.
    """

    path: Path
    name: str
    mpp: float | None = None
    mask: Path | None = None
    tiles: bool = False
    listed: bool = False


def find_inputs(
    named: Sequence[str], manifest: Path | None = None, *, tiles: bool = False
) -> tuple[list[SlideInput], list[str]]:
    """List what is to be scored, in the order in which it was named.

    A slide that is named twice is there once, as its manifest states it; with several masks or
    microns per pixel it is there as often.

    Args:
        named: Files, folders (searched through all levels, without results that lie there),
            patterns such as ``slides/*.svs``, or manifests ending in ``.csv``.
        manifest: A further manifest.
        tiles: Take folders as sets of tiles. ZIP archives always are.

    Returns:
        The inputs, and a line for each that is left out although it has an id of its own.

    Raises:
        UsageError: Nothing is there, a manifest is wrong, or two inputs have the same id.
    """
    found: list[SlideInput] = []
    for text in named:
        path = Path(text)
        if path.suffix.lower() == ".csv" and path.is_file():
            found += read_manifest(path)
        else:
            found += _of_path(text, path, tiles)
    if manifest is not None:
        found += read_manifest(manifest)
    if not found:
        raise UsageError("no slides", "at least one", "name files, folders or a manifest")
    return _distinct(found)


def _of_path(text: str, path: Path, tiles: bool) -> list[SlideInput]:
    if path.is_file() or (path.is_dir() and tiles):
        return [SlideInput(path, path.name, tiles=tiles or path.suffix.lower() == ".zip")]
    if path.is_dir():
        files = _slides_in(path)
        if not files and not any(is_results(folder) for folder in path.iterdir()):
            raise UsageError(
                f"no slides in the folder {text!r}",
                "files of a known suffix: " + " ".join(sorted(SLIDE_SUFFIXES | IMAGE_SUFFIXES)),
                "check the path; for a folder of tiles add --tiles",
            )
        return [SlideInput(file, file.name) for file in files]
    root = Path(path.anchor)
    try:
        matches = sorted(root.glob(str(path.relative_to(root))))
    except ValueError as error:
        raise UsageError(
            f"the pattern {text!r} ({error})",
            "** alone between slashes: slides/**/*.svs",
            "correct it",
        ) from error
    if not matches:
        raise UsageError(f"{text!r}", "a file, a folder or a pattern that fits some", _CHECK)
    matches = [match for match in without_results(matches) if not is_results(match)]
    return [entry for match in matches for entry in _of_path(str(match), match, tiles)]


def _slides_in(folder: Path) -> list[Path]:
    files = without_results(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if not path.name.startswith(".")]
    slides = [path for path in files if path.suffix.lower() in SLIDE_SUFFIXES]
    # Pictures that lie beside slides are mostly previews of them, and these are not scored twice.
    return slides or [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]


def without_results(paths: Iterable[Path]) -> list[Path]:
    """Sort paths, and leave out those in results of this or another run: these show slides too."""
    found = sorted(paths)
    results = {folder for folder in {path.parent for path in found} if is_results(folder)}
    return [path for path in found if path.parent not in results]


def _distinct(found: Sequence[SlideInput]) -> tuple[list[SlideInput], list[str]]:
    listed = {entry.path.resolve() for entry in found if entry.listed}
    kept: dict[tuple[Path, Path | None, float | None], SlideInput] = {}
    left_out = []
    for entry in found:
        path = entry.path.resolve()
        if path in listed and not entry.listed:
            continue
        mask = None if entry.mask is None else entry.mask.resolve()
        first = kept.setdefault((path, mask, entry.mpp), entry)
        if first.name != entry.name:
            left_out.append(
                f"{entry.name}: left out, it is {first.name} with the same mask and mpp"
            )
    return _told_apart(list(kept.values())), left_out


def _told_apart(entries: Sequence[SlideInput]) -> list[SlideInput]:
    """Call those of one name by their paths, which differ unless masks or microns do."""
    names = Counter(entry.name for entry in entries)
    apart = [replace(e, name=str(e.path)) if names[e.name] > 1 else e for e in entries]
    for name, count in Counter(entry.name for entry in apart).items():
        if count > 1:
            raise UsageError(
                f"{name!r}, {count} times with different masks or microns per pixel",
                "an id for each",
                "add a column id to the manifest",
            )
    return apart


def read_manifest(path: Path) -> list[SlideInput]:
    """Read a CSV table of slides with the columns path, and where known mpp, mask and id.

    Paths in it are relative to the folder that it lies in. Further columns are passed over.

    Raises:
        UsageError: It cannot be read, has no column ``path``, or a value is wrong; with the line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            columns = table.fieldnames or []
            rows = [(table.line_num, row) for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"the manifest {path} ({error})", "a CSV table", _CHECK) from error
    if "path" not in columns:
        raise UsageError(
            f"the manifest {path} with the columns {', '.join(columns) or 'none'}",
            "a first line with path, and where known mpp, mask, id",
            "add it",
        )
    entries = [_entry(path, line, row) for line, row in rows]
    names = [entry.name for entry in entries]
    for (line, row), entry in zip(rows, entries, strict=True):
        if row.get("id") and names.count(entry.name) > 1:
            raise UsageError(
                f"{path}, line {line}: the id {entry.name!r}, which is there twice",
                "distinct ids",
                "change one",
            )
    return entries


def _entry(manifest: Path, line: int, row: dict[str, str]) -> SlideInput:
    def text(column: str) -> str:
        return (row.get(column) or "").strip()

    def file(column: str) -> Path:
        path = manifest.parent / text(column)
        if not path.exists():
            raise UsageError(
                f"{manifest}, line {line}: {column} {text(column)!r}, which is not there",
                "a path, relative to the manifest",
                "correct it",
            )
        return path

    if not text("path"):
        raise UsageError(f"{manifest}, line {line}: no path", "a slide's", "add it")
    slide = file("path")
    mpp = None
    if text("mpp"):
        try:
            mpp = float(text("mpp"))
        except ValueError as error:
            raise UsageError(
                f"{manifest}, line {line}: mpp {text('mpp')!r}", "microns per pixel", "correct it"
            ) from error
    tiles = slide.is_dir() or slide.suffix.lower() == ".zip"
    mask = file("mask") if text("mask") else None
    return SlideInput(slide, text("id") or slide.name, mpp, mask, tiles, listed=True)
