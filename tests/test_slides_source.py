from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mambamic.errors import SlideError
from mambamic.slides.overview import read_overview
from mambamic.slides.source import open_slide

from .slide_files import blobs, write_slide


def test_a_slide_states_what_its_header_does(data_dir: Path) -> None:
    slide = open_slide(data_dir / "slides" / "CMU-1-Small-Region.svs")
    info = slide.info
    assert (info.reader, info.format, info.sizes) == ("openslide", "aperio", ((2220, 2967),))
    assert info.mpp == (0.499, 0.499)
    assert info.objective == 20
    assert slide.read(100, 100, 0, (64, 32)).size == (64, 32)
    slide.close()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("CMU-1-Small-Region.truncated.svs", "cannot be opened .OpenSlide: .*TiffSlide: "),
        ("broken.svs", "cannot be opened"),
        ("dicom_test_image.dcm", "cannot be opened"),
        ("none.svs", "is not there"),
    ],
)
def test_what_cannot_be_opened_says_so_in_one_line(data_dir: Path, name: str, said: str) -> None:
    with pytest.raises(SlideError, match=said) as caught:
        open_slide(data_dir / "slides" / name)
    assert "\n" not in str(caught.value)


def test_what_openslide_does_not_read_tiffslide_does(tmp_path: Path) -> None:
    import tifffile

    pixels = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
    tifffile.imwrite(tmp_path / "plain.tif", pixels, photometric="rgb")
    slide = open_slide(tmp_path / "plain.tif")
    assert slide.info.reader == "tiffslide"
    assert np.array_equal(np.asarray(slide.read(10, 20, 0, (50, 40))), pixels[20:60, 10:60])
    slide.close()


_OME = """<?xml version="1.0"?><OME><Image ID="Image:0" Name="{}"><Pixels/></Image>
<Image ID="Image:1" Name="label image"><Pixels/></Image></OME>"""


@pytest.mark.parametrize("tile", [None, (256, 256)])
@pytest.mark.parametrize("name", ["x.tif", "x.svs", "x.png"])
@pytest.mark.parametrize(
    ("description", "private"),
    [
        ("Label_Image of a slide", True),
        ("the macro", True),
        (_OME.format("macro image"), True),
        (_OME.format("slide 7"), False),
        ("a slide", False),
        ("", False),
    ],
)
def test_an_image_that_calls_itself_a_label_is_not_read(
    tile: tuple[int, int] | None, name: str, description: str, private: bool, tmp_path: Path
) -> None:
    """Tiled it is one that OpenSlide reads, else TiffSlide or Pillow."""
    import tifffile

    pixels = np.full((300, 400, 3), 9, np.uint8)
    tifffile.imwrite(tmp_path / name, pixels, photometric="rgb", tile=tile, description=description)
    if private:
        with pytest.raises(SlideError, match="may be the image of a label"):
            open_slide(tmp_path / name)
    else:
        open_slide(tmp_path / name).close()


def test_a_vendors_own_format_may_speak_of_labels(tmp_path: Path) -> None:
    """OpenSlide knows which of its images is which."""
    path = tmp_path / "s.svs"
    import tifffile

    pixels = np.full((300, 400, 3), 9, np.uint8)
    tifffile.imwrite(
        path, pixels, photometric="rgb", tile=(256, 256), metadata=None,
        description="Aperio Image Library v11\r\n400x300 [label of the block]|AppMag = 20",
    )  # fmt: skip
    slide = open_slide(path)
    assert slide.info.format == "aperio"
    slide.close()


def test_a_plain_image_is_decoded_as_the_server_does(tmp_path: Path) -> None:
    Image.new("RGBA", (60, 40), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    slide = open_slide(tmp_path / "clear.png")
    assert slide.info.reader == "pillow"
    assert slide.read(0, 0, 0, (5, 5)).getpixel((2, 2)) == (255, 255, 255)


def test_an_overview_is_read_block_by_block_and_around_damage(data_dir: Path) -> None:
    good = read_overview(data_dir / "slides" / "CMU-1-Small-Region.svs")
    bad = read_overview(data_dir / "slides" / "CMU-1-Small-Region.corrupt.svs")
    assert good.known.all()
    assert 0.85 < bad.known.mean() < 1
    # Smaller blocks are reduced from other starts: a level or so in few places.
    difference = np.abs(bad.pixels.astype(int) - good.pixels)[bad.known]
    assert difference.mean() < 1


def test_an_overview_of_a_pyramid_shows_the_whole(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "p.tiff", (8192, 4096), 3, blobs([(6000, 1000, 500)]))
    overview = read_overview(path, side=512)
    assert overview.pixels.shape == (256, 512, 3)
    dark = np.argwhere(overview.pixels[..., 1] < 160)
    assert np.abs(dark.mean(axis=0) - (1000 / 16, 6000 / 16)).max() < 2


def test_blocks_of_an_overview_begin_at_pixels_of_their_level(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between them OpenSlide interpolates: the picture is blurred, and three times as slow."""
    path = data_dir / "slides" / "pbc_mosaic.tiff"
    slide = open_slide(path)
    read, corners = slide.read, []

    def noting(x: int, y: int, level: int, size: tuple[int, int]) -> Image.Image:
        corners.append((x / slide.info.downsamples[level], y / slide.info.downsamples[level]))
        return read(x, y, level, size)

    monkeypatch.setattr(slide, "read", noting)
    read_overview(path, slide)
    assert len(corners) == 4
    assert all(place.is_integer() for corner in corners for place in corner)


def test_a_slide_that_vanishes_during_its_overview_says_so(data_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.svs"
    path.write_bytes((data_dir / "slides" / "CMU-1-Small-Region.corrupt.svs").read_bytes())
    slide = open_slide(path)
    path.unlink()
    with pytest.raises(SlideError, match="is not there"):
        read_overview(path, slide)
