"""Colours of classes and of probabilities."""

from __future__ import annotations

import colorsys

import numpy as np

from mambamic.preprocess import Pixels

Colour = tuple[int, int, int]
# Told apart also by most people who do not see red and green alike (Okabe and Ito 2008); their
# yellow is left out, which is not seen on pale tissue.
_FIRST: tuple[Colour, ...] = (
    (213, 94, 0),
    (0, 114, 178),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
    (120, 60, 160),
    (90, 90, 90),
)
_GOLDEN = 0.618034
# From dark to bright, as in inferno of matplotlib.
_HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))


def class_colours(count: int) -> list[Colour]:
    """Return a colour per class."""
    more = []
    for number in range(count - len(_FIRST)):
        hue = (0.07 + number * _GOLDEN) % 1
        red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, 0.55 + 0.3 * (number % 2))
        more.append((round(255 * red), round(255 * green), round(255 * blue)))
    return [*_FIRST, *more][:count]


def heat_table() -> Pixels:
    """Return (256, 3): a colour for each step from 0 to 1."""
    steps = np.linspace(0, 1, len(_HEAT))
    fine = np.linspace(0, 1, 256)
    channels = [np.interp(fine, steps, [colour[n] for colour in _HEAT]) for n in range(3)]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8)


def as_hex(colour: Colour) -> str:
    """Return a colour as CSS writes it."""
    return "#{:02x}{:02x}{:02x}".format(*colour)
