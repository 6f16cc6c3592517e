"""What is to be scored: files, folders, patterns and a manifest, as one list without doubles."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mambamic.errors import UsageError

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
    """

    path: Path
    name: str
    mpp: float | None = None
    mask: Path | None = None
    tiles: bool = False


def find_inputs(
    named: Sequence[str], manifest: Path | None = None, *, tiles: bool = False
) -> list[SlideInput]:
    """List what is to be scored, in the order in which it was named.

    Args:
        named: Files, folders (searched through all levels), patterns such as ``slides/*.svs``, or
            manifests ending in ``.csv``.
        manifest: A further manifest.
        tiles: Take folders as sets of tiles. ZIP archives always are.

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
        if not files:
            raise UsageError(
                f"no slides in the folder {text!r}",
                "files of a known suffix: " + " ".join(sorted(SLIDE_SUFFIXES | IMAGE_SUFFIXES)),
                "check the path; for a folder of tiles add --tiles",
            )
        return [SlideInput(file, file.name) for file in files]
    root = Path(path.anchor)
    try:
        matches = [str(match) for match in sorted(root.glob(str(path.relative_to(root))))]
    except ValueError as error:
        raise UsageError(
            f"the pattern {text!r} ({error})",
            "** alone between slashes: slides/**/*.svs",
            "correct it",
        ) from error
    if not matches:
        raise UsageError(f"{text!r}", "a file, a folder or a pattern that fits some", _CHECK)
    return [entry for match in matches for entry in _of_path(match, Path(match), tiles)]


def _slides_in(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if not path.name.startswith(".")]
    slides = [path for path in files if path.suffix.lower() in SLIDE_SUFFIXES]
    # Pictures that lie beside slides are mostly previews of them, and these are not scored twice.
    return slides or [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]


def _distinct(found: Iterable[SlideInput]) -> list[SlideInput]:
    by_path: dict[Path, SlideInput] = {}
    for entry in found:
        # What a manifest states wins over a bare path.
        known = by_path.get(entry.path.resolve())
        if known is None or (known.mpp is None and known.mask is None):
            by_path[entry.path.resolve()] = entry
    entries = list(by_path.values())
    names = [entry.name for entry in entries]
    # Of the same name in different folders: told apart by as much of the path as needed.
    return [
        SlideInput(
            e.path, str(e.path) if names.count(e.name) > 1 else e.name, e.mpp, e.mask, e.tiles
        )
        for e in entries
    ]


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
    return SlideInput(slide, text("id") or slide.name, mpp, mask, tiles)
