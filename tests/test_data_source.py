"""Finding and opening the splits of a data set; that they are read right is in training's tests."""

from __future__ import annotations

import io
import zipfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mambamic.data.source import FileSource, Stored, find_splits, open_split, refuse_unreadable
from mambamic.errors import DataError, DecodeError, MambamicError


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (9, 7)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 1).save(buffer, kind)
    return buffer.getvalue()


def write(root: Path, *names: str, data: bytes | None = None) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded("PNG") if data is None else data)
    return root


def test_splits_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path, "test/a/0.png", "train/a/0.png", "other/a/0.png")
    with zipfile.ZipFile(tmp_path / "val.zip", "w"):
        pass
    assert find_splits(tmp_path) == ("train", "val", "test")


def test_splits_of_a_zip_and_of_arrays(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "cells.zip", "w") as archive:
        archive.writestr("cells/val/a/0.png", b"")
        archive.writestr("cells/train/a/0.png", b"")
        archive.writestr("test/0.png", b"")  # not in a class
    assert find_splits(tmp_path / "cells.zip") == ("train", "val")
    np.savez(tmp_path / "cells.npz", test_images=np.zeros(1), test_labels=np.zeros(1))
    assert find_splits(tmp_path / "cells.npz") == ("test",)


def test_no_split_says_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, "training/a/0.png", "validation/a/0.png")
    with pytest.raises(DataError, match=r"train, val, test but training, validation; .*rename"):
        find_splits(tmp_path)
    with (
        ExitStack() as stack,
        pytest.raises(DataError, match=r"neither train/ nor train\.zip; .*arrange\.py make them"),
    ):
        open_split(tmp_path, "train", stack)
    write(tmp_path, "train/a/0.png")
    with (
        ExitStack() as stack,
        pytest.raises(DataError, match=r"check the path and the name of the split$"),
    ):
        open_split(tmp_path, "tset", stack)
    with pytest.raises(DataError, match=r"nothing has none of train, val, test; expected SPLIT/"):
        find_splits(tmp_path / "nothing")


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with ExitStack() as stack, pytest.raises(DataError, match=r"nowhere does not exist.*has neith"):
        open_split(tmp_path / "nowhere", "train", stack)
    with ExitStack() as stack, pytest.raises(DataError, match=r"x\.npz \(No such file"):
        open_split(tmp_path / "x.npz", "train", stack)


def test_files_at_other_depths_are_passed_over_and_listed(tmp_path: Path) -> None:
    write(tmp_path, "train/a/0.png", "train/a/more/1.png", "train/2.png", "train/a/.3.png")
    source = FileSource("train", tmp_path, None)
    assert source.names == ("train/a/0.png",)
    assert source.passed_over == ("train/2.png", "train/a/more/1.png")


def test_a_class_may_be_a_link(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "0.png")
    write(tmp_path, "train/a/0.png")
    (tmp_path / "train/b").symlink_to(tmp_path / "elsewhere")
    assert FileSource("train", tmp_path, None).names == ("train/a/0.png", "train/b/0.png")


def test_work_is_done_on_each_image_in_order(tmp_path: Path) -> None:
    for index in range(300):
        write(tmp_path, f"train/a/{index:03}.png", data=encoded("PNG", size=(index + 1, 2)))
    write(tmp_path, "train/a/100.png", data=b"no image")
    found = list(FileSource("train", tmp_path, None).map(lambda stored: stored.image.size))
    assert isinstance(found[100], DecodeError)
    assert found[:100] + found[101:] == [(width, 2) for width in range(1, 301) if width != 101]


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "L"), ("JPEG", "RGB"), ("TIFF", "I;16"), ("WEBP", "RGB")]
)
def test_an_image_knows_what_it_was_stored_as(kind: str, mode: str, tmp_path: Path) -> None:
    write(tmp_path, "train/a/0", data=encoded(kind, mode))
    found = list(FileSource("train", tmp_path, None).map(lambda s: (s.kind(), s.image.mode)))
    assert found == [(f"{kind} {mode}", "RGB")]


def test_arrays_have_a_kind_too() -> None:
    image = Image.new("RGB", (2, 2))
    assert [Stored(image, None, channels).kind() for channels in (1, 3)] == ["array L", "array RGB"]


def test_an_error_of_the_work_is_not_taken_for_a_bad_image(tmp_path: Path) -> None:
    def fail(_: Stored) -> None:
        raise ZeroDivisionError

    write(tmp_path, "train/a/0.png")
    with pytest.raises(ZeroDivisionError):
        list(FileSource("train", tmp_path, None).map(fail))


def test_unreadable_images_are_refused(tmp_path: Path) -> None:
    source = FileSource("train", write(tmp_path, "train/a/0.png"), None)
    refuse_unreadable([], source)
    error: MambamicError = DecodeError("damaged", "whole", "mend it")
    with pytest.raises(DataError, match=r"^1 of 1 images of split 'train' .*\(x\.png: damaged\)"):
        refuse_unreadable([("x.png", error)], source)
