"""What the scenarios send: cells that are drawn, or taken from MAMBAMIC_DATA, and bad input."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

VARIABLE = "MAMBAMIC_DATA"
SIDE = 224
# Tiles of slide scanners, camera crops, and what people send that is neither.
SIDES = (96, 224, 224, 360, 512, 1024)
FORMATS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 90},
    "TIFF": {"compression": "tiff_lzw"},
    "WEBP": {},
}
MODES = ("RGB", "RGB", "RGB", "L", "RGBA")
_KINDS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp")


@dataclass(frozen=True)
class Sent:
    """The bytes of one image, or of what is none.

    Args:
        content: The bytes.
        good: Whether a prediction has to come back.
    """

    content: bytes
    good: bool = True


def cells(number: int, seed: int = 0) -> list[Sent]:
    """Return cells as PNG files, from the folder or the ZIP in MAMBAMIC_DATA, else drawn ones."""
    data = os.environ.get(VARIABLE)
    if not data:
        return [Sent(_encoded(draw_cell(SIDE, seed + n), "PNG")) for n in range(number)]
    found = [Sent(content) for content, _ in zip(_files(Path(data)), range(number), strict=False)]
    if not found:
        raise SystemExit(f"{VARIABLE}={data}: no images; expected a folder or a ZIP of them")
    return found


def mixed(number: int, seed: int = 0) -> list[Sent]:
    """Return images of many sizes, formats and modes."""
    draw = np.random.default_rng(seed)
    images = []
    for index in range(number):
        kind = tuple(FORMATS)[index % len(FORMATS)]
        mode = str(draw.choice(MODES)) if kind != "JPEG" else "RGB"
        image = draw_cell(int(draw.choice(SIDES)), seed + index).convert(mode)
        images.append(Sent(_encoded(image, kind)))
    return images


def bad() -> list[Sent]:
    """Return input that a server has to refuse: empty, damaged, no image, far too many pixels."""
    whole = _encoded(draw_cell(SIDE, 0), "PNG")
    bomb = _encoded(Image.new("1", (9_000, 9_000)), "PNG")
    return [
        Sent(content, good=False)
        for content in (b"", b"not an image", whole[: len(whole) // 2], whole[100:], bomb)
    ]


def zipped(images: Sequence[Sent]) -> bytes:
    """Return a ZIP of images, named by their numbers."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for number, image in enumerate(images):
            archive.writestr(str(number), image.content)
    return out.getvalue()


def draw_cell(side: int, seed: int) -> Image.Image:
    """Return a drawn cell, noisy as a camera's picture is, so that it compresses as badly."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side - 0.5
    distance = np.hypot(x + draw.normal(0, 0.05), y + draw.normal(0, 0.05))
    pixels = np.full((side, side, 3), (236, 226, 222), np.float64)
    pixels[distance < draw.uniform(0.25, 0.4)] = (196, 176, 208)
    pixels[distance < draw.uniform(0.1, 0.2)] = (92, 58, 136)
    pixels += draw.normal(0, 4, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _encoded(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **FORMATS.get(kind, {}))
    return out.getvalue()


def _files(data: Path) -> Iterator[bytes]:
    if data.is_file():
        with zipfile.ZipFile(data) as archive:
            names = [name for name in archive.namelist() if name.lower().endswith(_KINDS)]
            yield from map(archive.read, names)
        return
    for path in sorted(data.rglob("*")):
        if path.suffix.lower() in _KINDS:
            yield path.read_bytes()
