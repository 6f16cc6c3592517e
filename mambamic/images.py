"""From the bytes of an image file to 8-bit RGB pixels, by one documented rule.

- Of a file with several pages or frames, the first.
- The orientation that EXIF, XMP or TIFF tags state is applied; unreadable metadata states none.
- 16-bit greyscale is scaled by its full range (value / 257), a TIFF that declares 12 bits per
  sample by the range of 12. Colour of 16 bits keeps its high byte.
- Floating point is taken as 0 to 1; other values are refused.
- Palette, 1-bit, LAB, CMYK and YCbCr are converted to sRGB; embedded colour profiles are ignored.
- Alpha, or a transparent colour, is composited over white.

JPEG pixels are decoded by libjpeg-turbo itself (simplejpeg), which gives the values that Pillow
gives, without Pillow's own copies of them; all else is Pillow's. Safe in threads. The one piece of
global state that is changed: from the first call on, Python warnings raised inside Pillow's modules
are ignored. Suspending them for each call instead (``warnings.catch_warnings``) is not safe in
threads.
"""

from __future__ import annotations

import importlib.util
import io
import re
import warnings
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base as ExifTag

from mambamic.errors import DecodeError, MambamicError, RequestError, TooLargeError

if TYPE_CHECKING:
    from typing import TypeAlias

    from PIL.ImageFile import ImageFile

    from mambamic.preprocess import Pixels

    BytesLike: TypeAlias = bytes | bytearray | memoryview

MAX_PIXELS = 64_000_000
# An explicit list: Pillow also registers formats that run external programs (EPS) or that no
# microscope writes, and each is a parser open to hostile bytes.
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "JPEG2000", "PPM") + (
    ("AVIF",) if importlib.util.find_spec("PIL.AvifImagePlugin") else ()
)

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TIFF_BITS_PER_SAMPLE = 258
_TIFF_PHOTOMETRIC = 262
_TIFF_TILE_WIDTH = 322
_TIFF_TILE_LENGTH = 323
_PILLOW_FILTER = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
_ANOTHER_FILE = "send another file, or save it again in one of these formats"


def decode(data: BytesLike, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file into 8-bit RGB by the rule at the head of this module.

    Args:
        data: The bytes of the file.
        max_pixels: Images of more pixels are refused by their header.

    Returns:
        An image of mode RGB.

    Raises:
        RequestError: There are no bytes.
        DecodeError: The bytes are not an image of a format in ``FORMATS``, or a damaged one.
        TooLargeError: More than ``max_pixels``, or a decompression bomb.
    """
    return to_rgb(open_image(data, max_pixels))


def open_image(data: BytesLike, max_pixels: int = MAX_PIXELS) -> ImageFile:
    """Read an image's header, and refuse what `decode` would refuse by it.

    Args:
        data: The bytes of the file.
        max_pixels: Images of more pixels are refused.

    Returns:
        What `to_rgb` takes; its pixels are not decoded yet.

    Raises:
        RequestError: There are no bytes.
        DecodeError: The header cannot be read.
        TooLargeError: More than ``max_pixels``, or a decompression bomb.
    """
    if len(data) == 0:
        raise RequestError("the image is empty", "the bytes of an image file", "send one")
    # Also after someone else put a filter in front of ours; the comparison is cheap.
    if warnings.filters[:1] != [_PILLOW_FILTER]:
        warnings.filterwarnings("ignore", module=_PILLOW_FILTER[3].pattern)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        tile = _tile_pixels(image)
    except UnidentifiedImageError as error:
        raise DecodeError(
            f"{len(data)} bytes that are not an image, or one whose header is damaged",
            "one of " + ", ".join(FORMATS),
            _ANOTHER_FILE,
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise _bomb(error) from error
    except Exception as error:
        # A text chunk that expands beyond Pillow's limits is known only by the message.
        if re.search("too large|MAX_TEXT", str(error), re.IGNORECASE):
            raise _bomb(error) from error
        raise _damaged(error) from error
    _check_size(image.size, tile, max_pixels)
    return image


def to_pixels(image: ImageFile) -> Image.Image | Pixels:
    """Decode what `open_image` opened, by the rule of this module, in the form that costs least.

    Returns:
        (H, W, 3) uint8 of most JPEG files, and of all else an image of mode RGB.

    Raises:
        DecodeError: The pixels are damaged, or of a kind that has no rule.
        TooLargeError: It is a decompression bomb.
    """
    pixels = _jpeg_pixels(image)
    if pixels is None:
        return to_rgb(image)
    turn = _orientation(image)
    return pixels if turn is None else Image.fromarray(pixels).transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image that Pillow has opened into 8-bit RGB, by the rule of this module.

    Raises:
        DecodeError: Its pixels are damaged, or of a kind that has no rule.
        TooLargeError: It is a decompression bomb.
    """
    try:
        # Pixels first: on some formats reading the metadata decodes, and hides, damaged pixels.
        image.load()
        rgb = _flat_rgb(_upright(image))
        # Nothing is left to apply: an orientation that stayed would be applied again.
        rgb.info = {}
        return rgb
    except MambamicError:
        raise
    except MemoryError as error:
        raise _bomb(error) from error
    # Pillow raises whatever its parsers trip over: OSError, SyntaxError, struct.error, KeyError...
    except Exception as error:
        raise _damaged(error) from error


def pixel_count(data: BytesLike, *, max_pixels: int = MAX_PIXELS) -> int:
    """Return width times height as the header states them, without decoding.

    Raises:
        RequestError: There are no bytes.
        DecodeError: The header cannot be read.
        TooLargeError: More than ``max_pixels``.
    """
    width, height = open_image(data, max_pixels).size
    return width * height


def _tile_pixels(image: ImageFile) -> int:
    tags = getattr(image, "tag_v2", {})
    if _TIFF_TILE_WIDTH not in tags or _TIFF_TILE_LENGTH not in tags:
        return 0
    return int(tags[_TIFF_TILE_WIDTH]) * int(tags[_TIFF_TILE_LENGTH])


def _check_size(size: tuple[int, int], tile: int, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise DecodeError(f"an image of {width} x {height} pixels", "at least one", _ANOTHER_FILE)
    # libtiff allocates a whole tile, however small the image that it belongs to.
    if max(width * height, tile) > max_pixels:
        raise TooLargeError(
            f"an image of {width} x {height} pixels" + (f", {tile} per tile" if tile else ""),
            f"at most {max_pixels / 1e6:g} megapixels",
            "cut it into tiles",
        )


def _jpeg_pixels(image: ImageFile) -> Pixels | None:
    """Return the pixels of a JPEG file, or None for Pillow to decode them or say what is wrong."""
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    assert isinstance(image.fp, io.BytesIO)
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(image.fp.getbuffer(), "RGB")
    except (ValueError, MemoryError):
        return None
    return pixels if pixels.shape == (image.height, image.width, 3) else None


def _upright(image: Image.Image) -> Image.Image:
    turn = _orientation(image)
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TRANSPOSE.get(image.getexif().get(ExifTag.Orientation, 1))
    # Damaged metadata raises as many kinds of error as damaged pixels, and is no reason to refuse.
    except Exception:
        return None


def _flat_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_integers(image)
    if image.mode == "F":
        return _from_floats(image)
    if image.has_transparency_data:
        # Pillow keeps four bytes a pixel, whatever the mode: no copy more than is needed.
        inked = image if image.mode in ("RGBA", "LA") else image.convert("RGBA")
        paper = Image.new("RGB", inked.size, "white")
        paper.paste(inked, mask=inked)
        return paper
    return image.convert("RGB")


def _from_integers(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise DecodeError(
            f"integer pixels from {low} to {high}",
            "8 or 16 bits, unsigned",
            "save it as 8-bit or 16-bit greyscale",
        )
    tags = getattr(image, "tag_v2", {})
    maximum = 4095 if tags.get(_TIFF_BITS_PER_SAMPLE) == (12,) else 65535
    table = np.rint(np.minimum(np.arange(65536) * (255 / maximum), 255)).astype(np.uint8)
    if tags.get(_TIFF_PHOTOMETRIC) == 0:  # "white is zero", which Pillow heeds only up to 8 bits
        table = 255 - table
    grey = table[values]
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _from_floats(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise DecodeError(
            f"floating-point pixels from {values.min():g} to {values.max():g}",
            "finite values from 0 to 1",
            "scale them, or save the image with 8 or 16 bits",
        )
    return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")


def _bomb(error: BaseException) -> TooLargeError:
    return TooLargeError(
        f"a decompression bomb ({error})",
        f"at most {MAX_PIXELS / 1e6:g} megapixels and metadata of ordinary size",
        "cut the image into tiles",
    )


def _damaged(error: Exception) -> DecodeError:
    reason = str(error) or type(error).__name__
    return DecodeError(
        f"a damaged image ({reason})", "a complete image file", "send the original again"
    )
