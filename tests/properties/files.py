"""Files as a hostile or unlucky client sends them: arbitrary bytes, and real ones, mutated."""

from __future__ import annotations

import io
from pathlib import Path

from hypothesis import strategies as st
from PIL import Image

from mambamic.images import FORMATS

# Larger ones make each example slow, and have no other parser.
MAX_FILE = 64 * 1024


def drawn() -> list[bytes]:
    """A small image in each format that is read, in the modes that it has."""
    made = []
    colour = Image.effect_mandelbrot((37, 23), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    for kind in FORMATS:
        for mode in ("RGB", "L", "P", "1", "RGBA", "I;16", "CMYK"):
            buffer = io.BytesIO()
            try:
                colour.convert("L" if mode == "I;16" else "RGB").convert(mode).save(buffer, kind)
            except (OSError, ValueError, KeyError):
                continue  # a mode that the format has not
            made.append(buffer.getvalue())
    assert len(made) > 25
    return made


def real(folder: Path) -> list[bytes]:
    """The odd files that other projects collected, those of moderate size."""
    files = [path.read_bytes() for path in sorted(folder.iterdir())]
    return [data for data in files if len(data) <= MAX_FILE]


@st.composite
def mutated(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """One of the originals with a few bytes changed, cut out, doubled or cut off."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(1, 16))
        what = draw(st.sampled_from(["change", "cut", "double", "truncate", "extreme"]))
        if what == "change":
            data[start : start + length] = draw(st.binary(min_size=length, max_size=length))
        elif what == "extreme":
            # Sizes and offsets: all ones, none, and the largest of either sign.
            value = draw(
                st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff"])
            )
            data[start : start + len(value)] = value
        elif what == "cut":
            del data[start : start + length]
        elif what == "double":
            data[start:start] = data[start : start + length * 8]
        else:
            del data[max(1, start) :]
    return bytes(data)
