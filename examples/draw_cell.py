"""Draw the sample image ``cell.png``: a neutrophil among red cells, as a stained smear shows it.

It is a drawing, made by this script from circles and noise; it is not a micrograph and shows no
patient's cell. The seed makes it the same each time.

    python examples/draw_cell.py
"""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIZE = 360  # pixels of the finished image
SCALE = 3  # drawn this much larger, then reduced
SEED = 7

BACKGROUND = (252, 232, 205)
RED_CELL = (203, 168, 166)
RED_CELL_PALLOR = (233, 209, 194)
CYTOPLASM = (217, 183, 190)
GRANULES = ((176, 112, 172), (150, 86, 164), (196, 138, 180), (232, 205, 208))
NUCLEUS = (72, 22, 140)
CHROMATIN = ((104, 56, 164), (132, 92, 182), (56, 12, 118))

Point = tuple[float, float]

# Where things are, as fractions of the image's side: centre, radius, and for red cells pallor.
RED_CELLS = (
    ((0.02, 0.20), 0.16, 0.5),
    ((0.97, 0.06), 0.17, 0.4),
    ((1.02, 0.62), 0.15, 0.5),
    ((0.06, 0.93), 0.17, 0.0),
    ((0.84, 1.00), 0.15, 0.45),
    ((0.44, -0.06), 0.13, 0.0),
)
CELL = ((0.49, 0.52), 0.325)
# The lobes of the nucleus in turn; neighbours are joined by a strand.
LOBES = (
    ((0.38, 0.42), 0.083),
    ((0.50, 0.365), 0.078),
    ((0.635, 0.45), 0.088),
    ((0.60, 0.62), 0.092),
    ((0.455, 0.665), 0.080),
)


def blob(rng: random.Random, centre: Point, radius: float, roughness: float) -> list[Point]:
    """Return the outline of a rounded, slightly irregular shape.

    Args:
        rng: Where its irregularity comes from.
        centre: As fractions of the side.
        radius: As a fraction of the side.
        roughness: Relative size of the bumps.
    """
    waves = [
        (order, rng.uniform(0, math.tau), rng.gauss(0, roughness / order)) for order in range(2, 7)
    ]
    side = SIZE * SCALE
    outline = []
    for step in range(180):
        angle = math.tau * step / 180
        bump = sum(height * math.cos(order * angle + phase) for order, phase, height in waves)
        reach = radius * (1 + bump)
        outline.append(
            (
                (centre[0] + reach * math.cos(angle)) * side,
                (centre[1] + reach * math.sin(angle)) * side,
            )
        )
    return outline


def mask_of(outlines: list[list[Point]], blur: float) -> Image.Image:
    """Return a soft mask of several outlines; ``blur`` is in pixels of the finished image."""
    mask = Image.new("L", (SIZE * SCALE,) * 2, 0)
    draw = ImageDraw.Draw(mask)
    for outline in outlines:
        draw.polygon(outline, fill=255)
    return mask.filter(ImageFilter.GaussianBlur(blur * SCALE))


def speckle(
    rng: random.Random,
    image: Image.Image,
    mask: Image.Image,
    colours: tuple[tuple[int, int, int], ...],
    count: int,
    radius: tuple[float, float],
) -> None:
    """Put soft dots of several colours onto what a mask covers; radii in finished pixels."""
    side = SIZE * SCALE
    box = mask.getbbox() or (0, 0, side, side)
    for colour in colours:
        dots = Image.new("L", image.size, 0)
        draw = ImageDraw.Draw(dots)
        for _ in range(count // len(colours)):
            x, y = rng.uniform(box[0], box[2]), rng.uniform(box[1], box[3])
            r = rng.uniform(*radius) * SCALE
            draw.ellipse((x - r, y - r, x + r, y + r), fill=rng.randint(120, 255))
        dots = dots.filter(ImageFilter.GaussianBlur(0.55 * SCALE))
        image.paste(colour, mask=ImageChops.multiply(dots, mask))


def draw_red_cell(
    rng: random.Random, image: Image.Image, centre: Point, radius: float, pallor: float
) -> None:
    """Paint one red cell, pale in the middle where it is seen from above."""
    image.paste(RED_CELL, mask=mask_of([blob(rng, centre, radius, 0.05)], blur=1.6))
    if pallor:
        middle = mask_of([blob(rng, centre, radius * pallor, 0.06)], blur=5)
        image.paste(RED_CELL_PALLOR, mask=middle)


def draw_neutrophil(rng: random.Random, image: Image.Image) -> None:
    """Paint the white cell: granular cytoplasm, then the lobed nucleus with its chromatin."""
    cytoplasm = mask_of([blob(rng, *CELL, 0.035)], blur=1.3)
    image.paste(CYTOPLASM, mask=cytoplasm)
    speckle(rng, image, cytoplasm, GRANULES, count=2600, radius=(0.5, 1.5))

    outlines = [blob(rng, centre, radius, 0.10) for centre, radius in LOBES]
    for (start, width), (end, _) in itertools.pairwise(LOBES):
        for step in range(1, 8):
            along = step / 8
            middle = tuple(a + (b - a) * along for a, b in zip(start, end, strict=True))
            waist = width * (0.45 + 0.35 * abs(2 * along - 1))
            outlines.append(blob(rng, (middle[0], middle[1]), waist, 0.05))
    nucleus = mask_of(outlines, blur=0.8)
    image.paste(NUCLEUS, mask=nucleus)
    inside = nucleus.filter(ImageFilter.MinFilter(4 * SCALE + 1))
    speckle(rng, image, inside, CHROMATIN, count=520, radius=(0.8, 2.6))


def draw(seed: int = SEED) -> Image.Image:
    """Return the image, ``SIZE`` pixels square, mode RGB."""
    rng = random.Random(seed)
    image = Image.new("RGB", (SIZE * SCALE,) * 2, BACKGROUND)
    for centre, radius, pallor in RED_CELLS:
        draw_red_cell(rng, image, centre, radius, pallor)
    draw_neutrophil(rng, image)
    small = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return small.filter(ImageFilter.GaussianBlur(0.7))


if __name__ == "__main__":
    target = Path(__file__).with_name("cell.png")
    draw().save(target, optimize=True)
    print(f"{target.name}: {target.stat().st_size / 1e3:.0f} kB")
