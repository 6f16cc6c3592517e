"""The pages that a person looks at: one per slide, and one over all; each needs no other file."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mambamic.errors import MambamicError
from mambamic.preprocess import Pixels, Preprocess
from mambamic.slides.colours import as_hex, class_colours
from mambamic.slides.files import fresh
from mambamic.slides.maps import Floats, heat_layer
from mambamic.slides.plan import TISSUE, Plan
from mambamic.slides.read import Source, TileReader

_SIDE = 1000  # of the slide's picture on the page
_LAYERS = 16  # classes with a layer of their own: the most frequent
_TOP = 8  # tiles per class
_TILE = 128
_LISTED = 50
# Opacity and choice of layer; stated by its hash in the page's policy, so that no other runs.
SCRIPT = """
const map = document.getElementById("map");
const layers = [...document.querySelectorAll("#map img.layer")];
const opacity = document.getElementById("opacity");
const choice = document.getElementById("layer");
function show() {
  for (const layer of layers) {
    layer.style.opacity = layer.dataset.layer === choice.value ? opacity.value / 100 : 0;
  }
  document.getElementById("heat").hidden = choice.value === "classes";
  document.getElementById("legend").hidden = choice.value !== "classes";
}
opacity.addEventListener("input", show);
choice.addEventListener("change", show);
show();
"""


@dataclass(frozen=True)
class Pictures:
    """What is drawn of a slide.

    Args:
        overview: (h, w, 3).
        covered: (h, w), where there are tiles.
        means: Per class, (h, w).
        layer: The most probable class of each pixel.
    """

    overview: Pixels
    covered: NDArray[np.bool_]
    means: Sequence[Floats]
    layer: Image.Image


@dataclass
class Shown:
    """What a slide's page shows.

    Args:
        job: How it was planned.
        summary: How it went.
        plan: Its tiles.
        scores: (N, classes), NaN where there are none.
        pictures: None for a set of tiles, and where there are no scores.
    """

    job: dict[str, Any]
    summary: dict[str, Any]
    plan: Plan
    scores: Floats
    pictures: Pictures | None = None


def write_page(path: Path, folder: Path, shown: Shown, run: dict[str, Any]) -> None:
    """Write the page of a slide.

    Args:
        path: The file.
        folder: Of the slide.
        shown: What it shows.
        run: How it was run.
    """
    classes = shown.job["model"]["classes"]
    colours = [as_hex(colour) for colour in class_colours(len(classes))]
    bins = shown.summary["confidence_histogram"]
    text = _template("slide.html").render(
        shown.summary,
        run=run,
        colours=dict(zip(classes, colours, strict=True)),
        drawn=_drawn(shown, classes),
        mask=_mask(folder / TISSUE) if shown.summary["status"] == "empty" else None,
        gallery=_gallery(shown, classes),
        tallest=max([1, *bins]),
        listed=shown.summary["failures"][:_LISTED],
        script=Markup(SCRIPT),
        script_hash=_script_hash(),
    )
    with fresh(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_index(path: Path, entries: Sequence[dict[str, Any]], run: dict[str, Any]) -> None:
    """Write the page over all slides of a run.

    Args:
        path: The file.
        entries: Per slide its summary, and ``folder``, the slide's folder, or None.
        run: How it was run.
    """
    slides = []
    for entry in entries:
        folder = None if entry["folder"] is None else path.parent / entry["folder"]
        overlay = None if folder is None else folder / "overlay.png"
        thumbnail = _thumbnail(overlay) if overlay is not None and overlay.exists() else None
        slides.append({**entry, "thumbnail": thumbnail})
    names = {name for entry in entries for name in entry.get("classes") or {}}
    text = _template("index.html").render(
        slides=slides,
        run=run,
        classes=[name for name in run["model"]["classes"] if name in names],
        failed=sum(entry["status"] == "failed" for entry in entries),
    )
    with fresh(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _template(name: str) -> Any:
    environment = Environment(
        loader=PackageLoader("mambamic.slides", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _script_hash() -> str:
    digest = hashlib.sha256(SCRIPT.encode()).digest()
    return base64.b64encode(digest).decode("ascii")


def _drawn(shown: Shown, classes: Sequence[str]) -> dict[str, Any] | None:
    """Return the slide's picture and its layers, as data URIs."""
    pictures = shown.pictures
    if pictures is None:
        return None
    picture = Image.fromarray(pictures.overview)
    scale = min(1.0, _SIDE / max(picture.size))
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    tops = [shown.summary["classes"][name]["tiles"] for name in classes]
    frequent = sorted(range(len(classes)), key=lambda n: (-tops[n], n))[:_LAYERS]
    layers = {"classes": _png(pictures.layer.resize(size, Image.Resampling.NEAREST))}
    covered = _nearest(pictures.covered, size)
    for number in sorted(frequent):
        layers[classes[number]] = _png(heat_layer(_nearest(pictures.means[number], size), covered))
    return {
        "picture": _jpeg(picture.resize(size, Image.Resampling.LANCZOS)),
        "width": size[0],
        "height": size[1],
        "layers": layers,
        "bad": _bad_layer(shown, size),
    }


def _nearest(values: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Return a map at another size: fewer pixels to colour, and the same ones as afterwards."""
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.NEAREST))


def _bad_layer(shown: Shown, size: tuple[int, int]) -> str | None:
    """Outline the tiles without scores."""
    bad = np.flatnonzero(np.isnan(shown.scores[:, 0]))
    if not len(bad):
        return None
    width, height = shown.job["header"]["sizes"][0]
    across, down = size[0] / width, size[1] / height
    side = shown.job["layout"]["size"]
    layer = Image.new("RGBA", size)
    draw = ImageDraw.Draw(layer)
    for number in bad.tolist():
        left, top = int(shown.plan.x[number]), int(shown.plan.y[number])
        box = (left * across, top * down, (left + side) * across, (top + side) * down)
        draw.rectangle(box, outline=(220, 0, 0, 255), width=2)
    return _png(layer)


def _gallery(
    shown: Shown, classes: Sequence[str]
) -> list[tuple[str, list[tuple[str, str, float]]]]:
    """Return, per class that any tile has, its most probable tiles: picture, place, probability."""
    job, scores = shown.job, shown.scores
    layout = job["layout"] or {"level": 0, "read_size": 0}
    look = Preprocess(input_size=_TILE)
    source = Source(
        Path(job["path"]), job["tiles_are_files"], layout["level"], layout["read_size"], look
    )
    reader = TileReader()
    best = np.nan_to_num(scores, nan=-1.0).argmax(axis=1)
    rows = []
    for number, name in enumerate(classes):
        mine = np.flatnonzero((best == number) & ~np.isnan(scores[:, 0]))
        order = np.argsort(-scores[mine, number], kind="stable")[:_TOP]
        tiles = [
            (picture, _place(shown.plan, tile), float(scores[tile, number]))
            for tile in mine[order].tolist()
            if (picture := _tile(reader, source, shown.plan, tile)) is not None
        ]
        if tiles:
            rows.append((name, tiles))
    reader.close()
    return rows


def _place(plan: Plan, tile: int) -> str:
    return plan.names[tile] if plan.names else f"x {plan.x[tile]}, y {plan.y[tile]}"


def _tile(reader: TileReader, source: Source, plan: Plan, tile: int) -> str | None:
    pixels = np.empty((1, _TILE, _TILE, 3), np.uint8)
    try:
        report = reader.read(source, plan.places([tile]), pixels)
    # The slide may be gone by now; the table is not.
    except MambamicError:
        return None
    return None if report.failures else _jpeg(Image.fromarray(pixels[0]))


def _mask(path: Path) -> str | None:
    if not path.exists():
        return None
    with Image.open(path) as image:
        image.thumbnail((600, 600))
        return _png(image)


def _thumbnail(path: Path) -> str:
    with Image.open(path) as image:
        picture = image.convert("RGB")
    picture.thumbnail((140, 140))
    return _jpeg(picture)


def _jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
