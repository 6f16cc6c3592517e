"""From the parts of a request to tiles: which forms are read, and what is said of the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from mambamic.errors import MambamicError, MediaTypeError, RequestError, TooLargeError
from mambamic.handlers.parts import Part
from mambamic.images import pixel_count
from mambamic.zips import MAX_TILES, is_zip, read_zip

MAX_PIXELS = 256_000_000

FORMS = (
    "one image in a form field (-F image=@cell.png), an image as the body with an image content "
    "type, several images in form fields of distinct names, or one ZIP of images"
)
ZIP_TYPES = {"application/zip", "application/x-zip-compressed", "application/x-zip"}
# Text fields that are settings and no tiles.
PREDICT_SETTINGS = ("embedding",)
EXPLAIN_SETTINGS = ("class", "method", "stage")
# A client that knows no better sends bytes as this, or states nothing.
UNSPECIFIC_TYPES = {"", "application/octet-stream", "binary/octet-stream"}

_SWITCH = {"0": False, "1": True, "false": False, "true": True}


@dataclass(frozen=True)
class Tile:
    """One image of a request: its bytes, or why there are none.

    Args:
        name: The form field, or the name inside the ZIP.
        content: The encoded image, or the error to answer with.
    """

    name: str
    content: bytes | MambamicError


@dataclass(frozen=True)
class TileRequest:
    """What one request asks for.

    Args:
        tiles: In request order.
        single: Answered with one object, not with a list.
        settings: What was asked for beside the tiles, by name.
        counts: Whether somebody wants to know what the tiles show, and no probe whether it works.
    """

    tiles: tuple[Tile, ...]
    single: bool
    settings: Mapping[str, str] = field(default_factory=dict)
    counts: bool = True

    def switch(self, name: str) -> bool:
        """Return a setting that is on or off, and off where it was not sent.

        Raises:
            RequestError: It is neither.
        """
        stated = self.settings.get(name, "0").lower()
        if stated not in _SWITCH:
            raise RequestError(f"{name}={stated[:80]!r}", "0 or 1", "send one of these")
        return _SWITCH[stated]


def read_request(
    parts: Sequence[Part], content_type: str = "", known: Collection[str] = ()
) -> TileRequest:
    """Read the tiles of a request.

    Args:
        parts: All parts in request order, repeated names included.
        content_type: Of the request as a whole.
        known: Names of text fields that are settings and not tiles.

    Raises:
        RequestError: There is no image, or a field name is repeated; a ZIP is empty or encrypted.
            Of several fields an empty one is a tile that carries this error.
        MediaTypeError: The body, or the only part, has a content type that is not read.
        TooLargeError: More than 256 tiles or 256 megapixels in all, or a ZIP that expands too far.
        DecodeError: The ZIP is damaged.
    """
    # What curl states when it is told nothing: an image sent so arrives cut up at every "&".
    if content_type.lower().startswith("application/x-www-form-urlencoded"):
        raise MediaTypeError(
            "the body has the content type 'application/x-www-form-urlencoded'",
            FORMS,
            "state the type of the body (curl --data-binary @cell.png -H 'Content-Type: "
            "image/png'), or use a form field (curl -F image=@cell.png)",
        )
    _refuse_repeats(parts)
    settings = {part.name: _text(part) for part in parts if _is_setting(part, known)}
    parts = [part for part in parts if part.name not in settings]
    if not any(size_of(part) for part in parts):
        raise RequestError(
            "the request carries no image",
            FORMS,
            "send the image in the form field 'image': curl URL -F image=@cell.png",
        )
    if len(parts) == 1:
        tile = _tile(parts[0])
        if isinstance(tile.content, MambamicError):
            raise tile.content
        if not _is_zip(parts[0], tile.content):
            return TileRequest((tile,), True, settings)
        tiles = tuple(Tile(name, data) for name, data in read_zip(tile.content))
    else:
        tiles = tuple(_tile_among_others(part) for part in parts)
    check_limits(tiles)
    return TileRequest(tiles, False, settings)


def size_of(part: Part) -> int:
    """Return how many bytes a part carries."""
    value = part.value
    # A worker that decodes hands over text and JSON as objects; they are told by their type.
    return len(value) if isinstance(value, bytes | bytearray | str) else 1


def _is_setting(part: Part, known: Collection[str]) -> bool:
    # A file of that name states the type of an image, or an unspecific one.
    return part.name in known and _media_type(part) in ("", "text/plain")


def _text(part: Part) -> str:
    value = part.value
    if isinstance(value, bytes | bytearray):
        value = value.decode("utf-8", "replace")
    return str(value).strip()


def _media_type(part: Part) -> str:
    return part.content_type.partition(";")[0].strip().lower()


def _refuse_repeats(parts: Sequence[Part]) -> None:
    repeated = [name for name, n in Counter(part.name for part in parts).items() if n > 1]
    if repeated:
        raise RequestError(
            f"the form field {repeated[0][:80]!r} was sent more than once "
            f"({len(parts)} fields sent, {len({part.name for part in parts})} distinct names)",
            "a distinct name for each field",
            "name the fields differently (image1, image2, ...), or send one ZIP of the images "
            "(-F image=@tiles.zip)",
        )


def _tile(part: Part) -> Tile:
    media_type = _media_type(part)
    read = media_type.startswith("image/") or media_type in UNSPECIFIC_TYPES | ZIP_TYPES
    if not read or not isinstance(part.value, bytes | bytearray):
        error = MediaTypeError(
            f"the field {part.name[:80]!r} has the content type {media_type[:80] or 'text'!r}",
            "an image content type (image/png, image/jpeg, image/tiff, ...), application/zip or "
            "application/octet-stream",
            "send the bytes of the image as they are, in a form field or as the body",
        )
        return Tile(part.name, error)
    return Tile(part.name, bytes(part.value))


def _is_zip(part: Part, data: bytes) -> bool:
    return _media_type(part) in ZIP_TYPES or is_zip(data)


def _tile_among_others(part: Part) -> Tile:
    if not size_of(part):
        return Tile(
            part.name,
            RequestError(
                f"the field {part.name[:80]!r} is empty",
                "the bytes of an image",
                "send the image, or leave the field out",
            ),
        )
    tile = _tile(part)
    if isinstance(tile.content, bytes) and _is_zip(part, tile.content):
        return Tile(
            part.name,
            RequestError(
                f"the field {part.name[:80]!r} is a ZIP among other fields",
                "a ZIP as the only field of a request",
                "send the ZIP alone, or the images as fields of their own",
            ),
        )
    return tile


def check_limits(
    tiles: Sequence[Tile],
    most: int = MAX_TILES,
    most_pixels: int = MAX_PIXELS,
    what: str = "in one request",
) -> None:
    """Refuse a request that asks for too much, before anything is decoded.

    Args:
        tiles: Of the request.
        most: How many there may be.
        most_pixels: How many pixels they may have together.
        what: For the message.

    Raises:
        TooLargeError: There are more.
    """
    if len(tiles) > most:
        raise TooLargeError(
            f"{len(tiles)} images {what}", f"at most {most}", "send them in several requests"
        )
    pixels = 0
    for tile in tiles:
        if isinstance(tile.content, bytes):
            try:
                pixels += pixel_count(tile.content)
            except MambamicError:
                # The decoder says so again, for that tile alone.
                continue
    if pixels > most_pixels:
        raise TooLargeError(
            f"{pixels / 1e6:.1f} megapixels {what}",
            f"at most {most_pixels // 1_000_000}",
            "send smaller images, or send them in several requests",
        )
