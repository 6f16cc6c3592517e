"""Several images in one request of a client, within the limits of a server."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from urllib3.filepost import encode_multipart_formdata

from mambamic.errors import MambamicError, UsageError
from mambamic.images import MAX_PIXELS, pixel_count
from mambamic.zips import MAX_TILES, is_zip

if TYPE_CHECKING:
    from mambamic.prediction import Prediction

# Unspecific on purpose: the server looks at the bytes, and so does it where a name would mislead.
_BYTES = "application/octet-stream"


@dataclass(frozen=True)
class Limits:
    """How much goes into one request; the defaults are well within what a server takes.

    Args:
        tiles: Images.
        size: Bytes, of all images together; a larger image goes alone.
        pixels: Of all images together.
    """

    tiles: int = 32
    size: int = 32 * 2**20
    pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if not 1 <= self.tiles <= MAX_TILES or min(self.size, self.pixels) < 1:
            raise UsageError(
                f"{self}", f"1 to {MAX_TILES} images, and at least 1 of the rest", "choose others"
            )


@dataclass(frozen=True)
class Bundle:
    """What goes into one request: images, and errors in the places of those that do not go.

    Args:
        tiles: In order, the bytes of an image or the error that is already known of it.
    """

    tiles: tuple[bytes | MambamicError, ...]

    @property
    def contents(self) -> list[bytes]:
        """The images that are sent."""
        return [tile for tile in self.tiles if isinstance(tile, bytes)]

    def outcomes(
        self, answers: Sequence[Prediction | MambamicError]
    ) -> Iterator[Prediction | MambamicError]:
        """Put the answers to ``contents`` in the places of the images."""
        coming = iter(answers)
        for tile in self.tiles:
            yield next(coming) if isinstance(tile, bytes) else tile

    def halves(self) -> tuple[Bundle, Bundle]:
        """Return two bundles of fewer images."""
        middle = len(self.tiles) // 2
        return Bundle(self.tiles[:middle]), Bundle(self.tiles[middle:])

    def encoded(self, embedding: bool) -> tuple[bytes, str]:
        """Return the body of the request and its content type.

        Args:
            embedding: Whether to ask for embeddings, which only a form can.
        """
        contents = self.contents
        # A ZIP that somebody takes for an image would be answered as what it holds.
        single = len(contents) == 1 and not is_zip(contents[0])
        body, kind = (contents[0], _BYTES) if single else (_zipped(contents), "application/zip")
        if not embedding:
            return body, kind
        field = ("image", body, kind)
        return encode_multipart_formdata({"tiles": field, "embedding": "1"})


def bundles(tiles: Iterable[bytes | MambamicError], limits: Limits) -> Iterator[Bundle]:
    """Cut a row of images into requests, in order."""
    held: list[bytes | MambamicError] = []
    size = pixels = 0
    for tile in tiles:
        more, more_pixels = _weigh(tile)
        full = len(held) == limits.tiles or size + more > limits.size
        if held and (full or pixels + more_pixels > limits.pixels):
            yield Bundle(tuple(held))
            held, size, pixels = [], 0, 0
        held.append(tile)
        size, pixels = size + more, pixels + more_pixels
    if held:
        yield Bundle(tuple(held))


def _weigh(tile: bytes | MambamicError) -> tuple[int, int]:
    if isinstance(tile, MambamicError):
        return 0, 0
    try:
        return len(tile), pixel_count(tile)
    except MambamicError:
        # The server says what is wrong with it.
        return len(tile), 0


def _zipped(contents: Sequence[bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for number, content in enumerate(contents):
            archive.writestr(str(number), content)
    return buffer.getvalue()
