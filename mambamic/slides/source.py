"""Opening a slide and reading pixels of it: OpenSlide, then TiffSlide, then Pillow.

Only pyramid levels are ever read. A slide's label and macro images, which show patients' names, and
the thumbnail that scanners store, have no way into this module; nor have its free-text properties.
"""

from __future__ import annotations

import logging
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from mambamic.errors import MambamicError, SlideError
from mambamic.images import decode
from mambamic.slides.inputs import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_PRIVATE = ("label", "macro")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PLAIN = IMAGE_SUFFIXES | {".tif", ".tiff"}


@dataclass(frozen=True)
class SlideInfo:
    """What a slide's header states.

    Args:
        reader: ``openslide``, ``tiffslide`` or ``pillow``.
        format: The vendor's, or the kind of image.
        sizes: Width and height of each level, in pixels.
        downsamples: Of each level, against level 0.
        mpp: Microns per pixel, across and down, as stated.
        objective: Magnification, as stated.
        bounds: Left, top, width and height of what was scanned, in level-0 pixels; the whole
            where nothing is stated.
        quickhash: OpenSlide's own hash, the same for all files of one slide.
    """

    reader: str
    format: str
    sizes: tuple[tuple[int, int], ...]
    downsamples: tuple[float, ...]
    mpp: tuple[float, float] | None
    objective: float | None
    bounds: tuple[int, int, int, int]
    quickhash: str | None = None


class Slide(Protocol):
    """An open slide.

    Args:
        info: Its header.
        threads: In which it may be read at a time.
    """

    info: SlideInfo
    threads: int

    def read(self, x: int, y: int, level: int, size: tuple[int, int]) -> Image.Image:
        """Read a region of a level as RGB; what was not scanned is white.

        Args:
            x: Left, in level-0 pixels.
            y: Top, in level-0 pixels.
            level: Which.
            size: Width and height in pixels of that level.

        Raises:
            SlideError: The region cannot be read. The slide is not to be used any more: one bad
                region makes OpenSlide refuse all that follow.
        """

    def close(self) -> None:
        """Let go of the file."""


def open_slide(path: Path) -> Slide:
    """Open a slide by the first reader that can.

    Raises:
        SlideError: None can.
    """
    if not path.exists():
        raise SlideError(f"{path} is not there", "a slide", "check the path")
    _refuse_label(path)
    readers: list[Callable[[Path], Slide]] = [_OpenSlide, _TiffSlide]
    if path.suffix.lower() in _PLAIN:
        readers.append(_Pillow)
    reasons = []
    for reader in readers:
        slide = _try(reader, path)
        if not isinstance(slide, str):
            return slide
        reasons.append(slide)
    raise SlideError(
        f"{path.name} cannot be opened ({'; '.join(reasons)})",
        "a complete slide or image file of a known format",
        "copy it again from where it was scanned",
    )


def _refuse_label(path: Path) -> None:
    """Refuse a TIFF that begins with what may be a label: of no vendor's format, that is all read.

    Raises:
        SlideError: It does.
    """
    import openslide
    import tifffile

    # What it has to say of damaged files comes as errors too.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    try:
        with path.open("rb") as file:
            tiff = file.read(4) in _TIFF
        if not tiff or openslide.OpenSlide.detect_format(path) not in (None, "generic-tiff"):
            return
        with tifffile.TiffFile(path) as opened:
            described = str(opened.pages.first.description)
    # Of what it cannot make sense the readers tell.
    except Exception:
        return
    # OME describes all images of a file at its beginning, the first of them first.
    first = re.search(r"<(?:\w+:)?Image\b[^>]*>", described)
    described = (first.group() if first else described).lower()
    if any(word in described for word in _PRIVATE):
        raise SlideError(
            f"{path.name} begins with what may be the image of a label",
            "a slide's pyramid",
            "convert the slide, without its label",
        )


def _try(reader: Callable[[Path], Slide], path: Path) -> Slide | str:
    """Return the open slide, or what the reader says against it."""
    try:
        return reader(path)
    except MambamicError as error:
        said = error.problem
    # Each library, and each parser below it, raises kinds of its own on damaged files.
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return f"{reader.__name__.strip('_')}: {said.splitlines()[0]}"


def _number(properties: Mapping[str, Any], name: str) -> float | None:
    try:
        return float(properties[name])
    except (KeyError, TypeError, ValueError):
        return None


def _info(reader: str, slide: Any, quickhash: str | None) -> SlideInfo:
    stated = slide.properties
    mpp_x, mpp_y = (_number(stated, f"{reader}.mpp-{axis}") for axis in "xy")
    edges = [_number(stated, f"{reader}.bounds-{side}") for side in ("x", "y", "width", "height")]
    width, height = slide.dimensions
    bounds = (0, 0, width, height)
    if all(edge is not None for edge in edges):
        left, top, across, down = (int(edge or 0) for edge in edges)
        bounds = (left, top, min(across, width - left), min(down, height - top))
    return SlideInfo(
        reader=reader,
        format=str(stated.get(f"{reader}.vendor") or "generic-tiff"),
        sizes=tuple((int(w), int(h)) for w, h in slide.level_dimensions),
        downsamples=tuple(float(factor) for factor in slide.level_downsamples),
        mpp=None if mpp_x is None or mpp_y is None else (mpp_x, mpp_y),
        objective=_number(stated, f"{reader}.objective-power"),
        bounds=bounds,
        quickhash=quickhash,
    )


def _on_white(image: Image.Image) -> Image.Image:
    """Put what has transparency on white, as the server does with every image."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    if image.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")
    paper = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(paper, image).convert("RGB")


class _OpenSlide:
    threads = 4  # more would take memory: blocks of an overview are large

    def __init__(self, path: Path) -> None:
        import openslide

        self._slide = openslide.OpenSlide(path)
        quickhash = self._slide.properties.get(openslide.PROPERTY_NAME_QUICKHASH1)
        self.info = _info("openslide", self._slide, quickhash)

    def read(self, x: int, y: int, level: int, size: tuple[int, int]) -> Image.Image:
        import openslide

        try:
            return _on_white(self._slide.read_region((x, y), level, size))
        except openslide.OpenSlideError as error:
            raise _unreadable(error) from error

    def close(self) -> None:
        self._slide.close()


class _TiffSlide:
    threads = 1

    def __init__(self, path: Path) -> None:
        import tifffile
        import tiffslide

        # TiffSlide leaves a file open that it cannot read.
        with tifffile.TiffFile(path) as file:
            assert file.pages.first
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that it does not know
            self._slide = tiffslide.TiffSlide(path)
            self.info = _info("tiffslide", self._slide, None)

    def read(self, x: int, y: int, level: int, size: tuple[int, int]) -> Image.Image:
        try:
            return _on_white(self._slide.read_region((x, y), level, size))
        # tifffile, zarr and imagecodecs raise whatever they trip over.
        except Exception as error:
            raise _unreadable(error) from error

    def close(self) -> None:
        self._slide.close()


class _Pillow:
    """A plain image, decoded whole as the server decodes it."""

    threads = 1

    def __init__(self, path: Path) -> None:
        self._image = decode(path.read_bytes())
        width, height = self._image.size
        self.info = SlideInfo(
            reader="pillow",
            format=path.suffix.lower().lstrip("."),
            sizes=((width, height),),
            downsamples=(1.0,),
            mpp=None,
            objective=None,
            bounds=(0, 0, width, height),
        )

    def read(self, x: int, y: int, level: int, size: tuple[int, int]) -> Image.Image:
        return self._image.crop((x, y, x + size[0], y + size[1]))

    def close(self) -> None:
        self._image.close()


def _unreadable(error: Exception) -> SlideError:
    said = str(error).splitlines()
    return SlideError(
        f"a region cannot be read ({said[0] if said and said[0] else type(error).__name__})",
        "pixels",
        "copy the slide again from where it was scanned",
    )
