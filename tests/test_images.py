"""From bytes to RGB: one rule for every format, one kind of error for every damage."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from mambamic.errors import DecodeError, MambamicError, RequestError, TooLargeError
from mambamic.images import decode, open_image, pixel_count, to_pixels, to_rgb

# What each file of odd_images is to give: the size of the upright image, or the error.
ODD: dict[str, tuple[int, int] | type[MambamicError]] = {
    "12bit.cropped.tif": (100, 100),
    "16bit.cropped.tif": (64, 64),
    "DS_169665_not_an_image.jpg": DecodeError,
    "broken.png": DecodeError,
    "broken_data_stream.png": DecodeError,
    "decompression_bomb.gif": TooLargeError,
    "empty_gps_ifd.jpg": (10, 10),
    "exif_typeerror.jpg": (800, 531),
    "g4_orientation_6.tif": (590, 88),
    "hopper.Lab.tif": (128, 128),
    "hopper_16bit_qtables.jpg": (128, 128),
    "hopper_gray.jpg": (128, 128),
    "hopper_orientation_6.jpg": (128, 128),
    "hopper_orientation_6.webp": (128, 128),
    "i_trns.png": (64, 64),
    "li_test_orient6.tif": (180, 120),
    "li_yb10kx5k.zstd.tiff": (10000, 5000),
    "multipage.tiff": (10, 10),
    "pil_sample_cmyk.jpg": (100, 100),
    "sgi_crash.bin": DecodeError,
    "transparent.png": (200, 150),
    "truncated_image.png": DecodeError,
    "truncated_jpeg.jpg": DecodeError,
    "vips_1bit.tif": (256, 4),
    "vips_subsampled.tif": (250, 325),
}
GRADIENT = np.linspace(0, 255, 24 * 32).astype(np.uint8).reshape(24, 32)


def saved(image: Image.Image, format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


def pixels(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("name", ODD)
def test_odd_file(name: str, data_dir: Path) -> None:
    data = (data_dir / "odd_images" / name).read_bytes()
    expected = ODD[name]
    start = time.monotonic()
    if isinstance(expected, tuple):
        image = decode(data)
        assert (image.mode, image.size) == ("RGB", expected)
        assert pixel_count(data) == expected[0] * expected[1]
    else:
        with pytest.raises(expected):
            decode(data)
    assert time.monotonic() - start < 5


def test_every_odd_file_is_known(data_dir: Path) -> None:
    assert {path.name for path in (data_dir / "odd_images").iterdir()} == set(ODD)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("hopper_orientation_6.jpg", 12), ("hopper_orientation_6.webp", 12), ("hopper.Lab.tif", 25)],
)
def test_same_photograph_comes_out_the_same(name: str, tolerance: float, data_dir: Path) -> None:
    # Upright and in grey, whatever orientation and colour space it was stored in.
    folder = data_dir / "odd_images"
    grey = np.asarray(decode((folder / "hopper_gray.jpg").read_bytes()).convert("L"), np.float64)
    other = np.asarray(decode((folder / name).read_bytes()).convert("L"), np.float64)
    assert np.abs(grey - other).mean() < tolerance
    assert np.abs(grey - np.rot90(other)).mean() > 2 * tolerance


def test_cmyk_photograph_is_not_inverted(data_dir: Path) -> None:
    # It shows red letters on black, with the stored values inverted as Adobe does.
    red, green, blue = pixels((data_dir / "odd_images/pil_sample_cmyk.jpg").read_bytes())[0, 0]
    assert red > 200
    assert max(green, blue) < 60


@pytest.mark.parametrize("format_", ["PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "JPEG2000"])
def test_lossless_formats_keep_grey_values(format_: str) -> None:
    options = {"lossless": True} if format_ == "WEBP" else {}
    image = Image.fromarray(GRADIENT)
    data = saved(image.convert("RGB") if format_ == "WEBP" else image, format_, **options)
    assert (pixels(data) == GRADIENT[..., None]).all()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_in_any_form(kind: type[bytes]) -> None:
    data = saved(Image.fromarray(GRADIENT), "PNG")
    assert decode(kind(data)).size == (32, 24)


def test_16_bit_is_scaled_by_the_full_range() -> None:
    deep = GRADIENT.astype(np.uint16) * 257
    assert (pixels(saved(Image.fromarray(deep), "PNG"))[..., 0] == GRADIENT).all()
    assert (pixels(saved(Image.fromarray(deep), "TIFF"))[..., 0] == GRADIENT).all()
    assert pixels(saved(Image.fromarray(deep + 129 - 129 // 257), "PNG")).max() == 255


def test_16_bit_white_is_zero() -> None:
    deep = Image.fromarray(GRADIENT.astype(np.uint16) * 257)
    assert (pixels(saved(deep, "TIFF", tiffinfo={262: 0}))[..., 0] == 255 - GRADIENT).all()


def test_12_bit_is_scaled_by_the_range_of_12(data_dir: Path) -> None:
    data = (data_dir / "odd_images/12bit.cropped.tif").read_bytes()
    stored = np.asarray(Image.open(io.BytesIO(data)))
    assert stored.max() == 30
    assert (pixels(data)[..., 0] == np.rint(stored / 4095 * 255)).all()


def test_integers_beyond_16_bit_are_refused() -> None:
    wide = Image.fromarray(np.array([[0, 70_000]], np.int32))
    with pytest.raises(DecodeError, match="integer pixels from 0 to 70000"):
        decode(saved(wide, "TIFF"))


def test_floats_from_0_to_1() -> None:
    data = saved(Image.fromarray(GRADIENT.astype(np.float32) / 255), "TIFF")
    assert (pixels(data)[..., 0] == GRADIENT).all()


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), float("inf")])
def test_other_floats_are_refused(value: float) -> None:
    image = Image.fromarray(np.array([[0.5, value]], np.float32))
    with pytest.raises(DecodeError, match="floating-point"):
        decode(saved(image, "TIFF"))


@pytest.mark.parametrize(
    ("mode", "format_"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF")]
)
def test_alpha_over_white(mode: str, format_: str) -> None:
    # Black, from opaque to clear: over white it is the inverted alpha.
    image = Image.merge("LA", [Image.new("L", (32, 24)), Image.fromarray(255 - GRADIENT)])
    options = {"lossless": True, "exact": True} if format_ == "WEBP" else {}
    data = saved(image.convert(mode), format_, **options)
    assert np.abs(pixels(data).astype(int) - GRADIENT[..., None]).max() <= 1


def test_every_alpha_over_every_value() -> None:
    value, alpha = np.meshgrid(np.arange(256), np.arange(256))
    colours = np.stack([value, 255 - value, value // 2, alpha], -1).astype(np.uint8)
    for rgba in (Image.fromarray(colours), Image.fromarray(colours[..., [0, 3]])):
        paper = Image.new("RGBA", rgba.size, "white")
        expected = Image.alpha_composite(paper, rgba.convert("RGBA")).convert("RGB")
        assert (pixels(saved(rgba, "PNG")) == np.asarray(expected)).all()


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_transparent_colour_is_white(mode: str) -> None:
    image = Image.new(mode, (4, 1), 0)
    if mode == "P":
        image.putpalette([9, 9, 9, 200, 100, 50])
        image.putpixel((3, 0), 1)
    key: Any = (0, 0, 0) if mode == "RGB" else 0
    data = saved(image, "PNG", transparency=key)
    assert (pixels(data)[0, 0] == 255).all()
    if mode == "P":
        assert tuple(pixels(data)[0, 3]) == (200, 100, 50)


def test_16_bit_transparent_value(data_dir: Path) -> None:
    data = (data_dir / "odd_images/i_trns.png").read_bytes()
    stored = np.asarray(Image.open(io.BytesIO(data)))
    # The transparent value is 255 of 65535, without it almost black.
    assert (stored == 255).any()
    assert (pixels(data)[stored == 255] == 255).all()
    assert (pixels(data)[stored != 255] <= 1).all()


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "P"])
def test_colour_spaces(mode: str) -> None:
    colours = Image.new("RGB", (8, 8), (200, 90, 30))
    if mode == "LAB":
        from PIL import ImageCms

        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        converted = ImageCms.profileToProfile(colours, srgb, lab, outputMode="LAB")
        assert converted is not None
    elif mode == "P":
        converted = colours.quantize(2)
    else:
        converted = colours.convert(mode)
    options = {"compression": "jpeg"} if mode == "YCbCr" else {}
    decoded = pixels(saved(converted, "TIFF", **options))
    assert np.abs(decoded[0, 0].astype(int) - (200, 90, 30)).max() <= 3


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(format_: str, orientation: int) -> None:
    # Quadrants, so that the loss of JPEG and WebP does not matter.
    upright = np.kron(np.array([[20, 90], [160, 230]], np.uint8), np.ones((16, 32), np.uint8))
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(np.ascontiguousarray(stored)), format_, exif=exif)
    decoded = pixels(data)
    assert decoded.shape == (32, 64, 3)
    assert np.array_equal(np.asarray(to_pixels(open_image(data))), decoded)
    assert np.abs(decoded[4::8, 4::8, 0].astype(int) - upright[4::8, 4::8]).max() <= 3


@pytest.mark.parametrize("format_", ["TIFF", "GIF", "WEBP", "PNG"])
def test_first_page(format_: str) -> None:
    pages = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    data = saved(pages[0], format_, save_all=True, append_images=pages[1:])
    red, green, blue = pixels(data)[4, 4]
    assert red > 245
    assert max(green, blue) < 10


def test_no_bytes() -> None:
    with pytest.raises(RequestError, match="empty"):
        decode(b"")
    with pytest.raises(RequestError, match="empty"):
        pixel_count(b"")


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_truncated(format_: str, part: float) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    data = saved(Image.fromarray(noise), format_)
    with pytest.raises(DecodeError):
        decode(data[: int(len(data) * part)])


@pytest.mark.parametrize("format_", ["EPS", "ICO", "TGA", "SGI", "PCX", "PDF", "ICNS"])
def test_formats_that_are_not_enabled(format_: str) -> None:
    with pytest.raises(DecodeError, match="not an image"):
        decode(saved(Image.new("RGB", (32, 32)), format_))


# Below Pillow's own limits, between its warning and its error, and beyond.
@pytest.mark.parametrize("side", [8001, 10_000, 13_000, 60_000])
def test_size_is_read_from_the_header(side: int) -> None:
    data = png_header(side, side)
    for function in (decode, pixel_count):
        with pytest.raises(TooLargeError, match="at most 64 megapixels"):
            function(data)


def test_limit_can_be_set() -> None:
    data = saved(Image.new("L", (10, 10)), "PNG")
    assert decode(data, max_pixels=100).size == (10, 10)
    with pytest.raises(TooLargeError, match="10 x 10"):
        decode(data, max_pixels=99)


def test_text_chunk_that_expands() -> None:
    body = b"Comment\x00\x00" + zlib.compress(bytes(20_000_000))
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body
    chunk += struct.pack(">I", zlib.crc32(b"zTXt" + body))
    plain = saved(Image.new("L", (8, 8)), "PNG")
    with pytest.raises(TooLargeError, match="bomb"):
        decode(plain[:33] + chunk + plain[33:])


def test_tile_larger_than_its_image() -> None:
    data = bytearray(saved(Image.new("L", (8, 8)), "TIFF"))
    # Two entries more, sorted by tag as the format wants: 322 and 323, type LONG, one value.
    offset = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, offset)[0]
    entries = [bytes(data[offset + 2 + 12 * i : offset + 14 + 12 * i]) for i in range(count)]
    entries += [struct.pack("<HHII", tag, 4, 1, 40_000) for tag in (322, 323)]
    entries.sort(key=lambda entry: struct.unpack_from("<H", entry)[0])
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    struct.pack_into("<I", data, 4, len(data))
    with pytest.raises(TooLargeError, match="1600000000 per tile"):
        decode(bytes(data) + directory)


@pytest.mark.parametrize("name", ["exif_typeerror.jpg", "empty_gps_ifd.jpg", "truncated_jpeg.jpg"])
def test_warnings_do_not_leak(name: str, data_dir: Path) -> None:
    data = (data_dir / "odd_images" / name).read_bytes()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for blob in (data, png_header(10_000, 10_000), damaged_exif()):
            with contextlib.suppress(MambamicError):
                decode(blob)
    assert not caught


def damaged_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.new("L", (8, 4)), "JPEG", exif=exif)
    # The one entry now claims a value beyond the end.
    at = data.index(b"Exif\x00\x00") + 6
    entry = data.index(b"\x01\x12", at)
    return data[: entry + 2] + b"\x00\x05\x00\x00\xff\xff\x7f\xff\xff\xff" + data[entry + 12 :]


def test_damaged_exif_states_no_orientation() -> None:
    with pytest.warns(UserWarning, match="data|Truncated"):
        Image.open(io.BytesIO(damaged_exif())).getexif().get(0x0112)
    assert decode(damaged_exif()).size == (8, 4)


def test_threads_agree_and_global_state_stays(data_dir: Path) -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    names = [name for name, result in ODD.items() if isinstance(result, tuple) and result[0] < 900]
    blobs = [(data_dir / "odd_images" / name).read_bytes() for name in names] * 4
    alone = [decode(blob).tobytes() for blob in blobs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda blob: decode(blob).tobytes(), blobs))
    assert alone == together
    after = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    assert before == after


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_give_an_image_or_our_error(seed: int, data_dir: Path) -> None:
    rng = random.Random(seed)
    paths = sorted((data_dir / "odd_images").iterdir())
    originals = [path.read_bytes() for path in paths if path.stat().st_size < 60_000]
    outcomes = {"image": 0, "error": 0}
    for _ in range(150):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.choice((1, 3, 10))):
            data[rng.randrange(min(len(data), rng.choice((64, 100_000))))] = rng.randrange(256)
        try:
            assert decode(data).mode == "RGB"
            outcomes["image"] += 1
        except MambamicError:
            outcomes["error"] += 1
    assert min(outcomes.values()) > 10


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_pixels_are_those_of_pillow(mode: str, subsampling: int, progressive: bool) -> None:
    """Sizes that are and are not whole blocks, colour and grey."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    large = Image.fromarray(noise).resize((640, 480))
    for size in ((224, 224), (123, 77), (17, 16), (9, 8), (1, 1)):
        options = {"subsampling": subsampling, "progressive": progressive, "quality": 85}
        data = saved(large.resize(size).convert(mode), "JPEG", **options)
        pixels = to_pixels(open_image(data))
        assert isinstance(pixels, np.ndarray) == (mode != "CMYK")
        assert np.array_equal(np.asarray(pixels), np.asarray(decode(data)))


def test_odd_jpeg_files_come_out_as_by_pillow(data_dir: Path) -> None:
    """Those that are damaged with the same error."""
    files = sorted((data_dir / "odd_images").glob("*.jpg"))
    assert len(files) > 5
    for file in files:
        expected, got = (outcome(way, file.read_bytes()) for way in (to_rgb, to_pixels))
        assert got == expected, file.name


def outcome(way: Callable[[ImageFile.ImageFile], object], data: bytes) -> object:
    try:
        return np.asarray(way(open_image(data))).tolist()
    except MambamicError as error:
        return type(error), str(error)
