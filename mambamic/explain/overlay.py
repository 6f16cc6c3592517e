"""The picture of an explanation: the image, the heat over it, and a caption below."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mambamic.explain.explanation import Explanation
from mambamic.preprocess import Preprocess

# Stained cells are pink to violet: these stand out from them. From weak to strong.
_COLOURS = ((0, 130, 160), (0, 200, 120), (255, 235, 0), (235, 30, 0))
_OPACITY = 0.65  # where the evidence is strongest
_LONGEST = 60  # characters of a class name


def overlay(image: Image.Image, explanation: Explanation, preprocess: Preprocess) -> Image.Image:
    """Draw the heat over the image, and the class and its probability below.

    Args:
        image: RGB, as it was before it was brought to the model's size.
        explanation: Of this image.
        preprocess: Which brought it there.

    Returns:
        An RGB image: the given one's size, and a caption below it, for which an image narrower
        than the caption is widened on the right.
    """
    heat = _over_image(explanation, image.size, preprocess)
    steps = np.linspace(0, 1, 256)
    anchors = np.linspace(0, 1, len(_COLOURS))
    tables = [
        np.rint(np.interp(steps, anchors, band)).astype(int).tolist()
        for band in zip(*_COLOURS, strict=True)
    ]
    colours = Image.merge("RGB", [heat.point(table) for table in tables])
    opacity = heat.point([round(255 * _OPACITY * step**0.7) for step in steps.tolist()])
    return _captioned(Image.composite(colours, image, opacity), _caption(explanation))


def encode(picture: Image.Image) -> bytes:
    """Return a picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _over_image(
    explanation: Explanation, size: tuple[int, int], preprocess: Preprocess
) -> Image.Image:
    """Return the heat from 0 to 255 over the whole image, 0 where the model does not look."""
    strongest = float(explanation.heat.max())
    share: NDArray[np.float32] = explanation.heat / (strongest if strongest > 0 else 1)
    small = Image.fromarray(np.rint(share * 255).astype(np.uint8))
    left, top, right, bottom = (round(edge) for edge in preprocess.box(size))
    whole = Image.new("L", size)
    scaled = small.resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.BILINEAR)
    whole.paste(scaled, (left, top))
    return whole


def _caption(explanation: Explanation) -> str:
    prediction, label = explanation.prediction, explanation.label
    text = f"{_short(label)}  {prediction.probabilities[label]:.3f}"
    if label != prediction.label:
        text += f"  (predicted: {_short(prediction.label)}  {prediction.probability:.3f})"
    return text


def _short(name: str) -> str:
    line = " ".join(name.split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."


def _captioned(picture: Image.Image, text: str) -> Image.Image:
    height = min(64, max(13, picture.width // 16))
    font = ImageFont.load_default(height)
    margin = height // 2
    width = max(picture.width, round(font.getlength(text)) + 2 * margin)
    canvas = Image.new("RGB", (width, picture.height + height + 2 * margin), "white")
    canvas.paste(picture)
    baseline = picture.height + margin + round(0.8 * height)
    ImageDraw.Draw(canvas).text((margin, baseline), text, "black", font, anchor="ls")
    return canvas
