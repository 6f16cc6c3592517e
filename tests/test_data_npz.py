"""MedMNIST files: what is read, and every way in which one can be wrong."""

from __future__ import annotations

import io
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib import format as npy

from mambamic.data.npz import ArraySource, read_class_names
from mambamic.data.source import open_split
from mambamic.errors import DataError

IMAGES = np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4)
LABELS = np.array([[0], [1], [2], [0], [1], [2]], np.uint8)


def write(path: Path, **arrays: Any) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def read(path: Path, split: str = "train", classes: tuple[str, ...] | None = None) -> ArraySource:
    """Open a split and read its images once, so that all that can be wrong with it shows."""
    with ExitStack() as stack:
        source = open_split(path, split, stack, classes)
        assert isinstance(source, ArraySource)
        found = list(source.map(lambda stored: stored.image.getpixel((1, 0))))
    assert len(found) == len(source)
    return source


def test_one_channel_becomes_three(tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz", train_images=IMAGES, train_labels=LABELS)
    with ExitStack() as stack:
        source = open_split(path, "train", stack)
        images = [np.asarray(image) for image in source.map(lambda stored: stored.image)]
    assert np.array_equal(np.stack(images), np.repeat(IMAGES[..., None], 3, -1))
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert source.classes == ("0", "1", "2")
    assert not source.multi_label


@pytest.mark.parametrize("labels", [LABELS[:, 0], LABELS.astype(np.int64), LABELS > 0])
def test_labels_of_several_types(labels: Any, tmp_path: Path) -> None:
    source = read(write(tmp_path / "x.npz", train_images=IMAGES, train_labels=labels))
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == labels.reshape(6).astype(int).tolist()


def test_classes_are_those_of_all_splits(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.npz",
        train_images=IMAGES, train_labels=LABELS, val_images=IMAGES[:2], val_labels=LABELS[:2],
    )  # fmt: skip
    assert read(path, "val").classes == read(path, "train").classes == ("0", "1", "2")


def test_names_are_read_from_beside_the_file_or_given(tmp_path: Path) -> None:
    path = write(tmp_path / "x_64.npz", train_images=IMAGES, train_labels=LABELS)
    assert read(path, classes=("a", "b", "c")).classes == ("a", "b", "c")
    (tmp_path / "x_64.classes.txt").write_text("tubule\n\n duct, collecting \npodocyte\nnone\n")
    assert read(path).classes == ("tubule", "duct, collecting", "podocyte", "none")


def test_labels_are_brought_into_the_order_that_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz", train_images=IMAGES, train_labels=LABELS)
    (tmp_path / "x.classes.txt").write_text("tubule\nduct\npodocyte\n")
    source = read(path, classes=("duct", "none", "podocyte", "tubule"))
    assert source.classes == ("duct", "none", "podocyte", "tubule")
    assert source.labels.tolist() == [3, 0, 2, 3, 0, 2]
    with pytest.raises(DataError, match="has the classes tubule, duct, podocyte, by the file"):
        read(path, classes=("a", "b", "c"))
    several = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [0, 0, 0]])
    write(path, train_images=IMAGES, train_labels=several)
    order = ("podocyte", "tubule", "duct")
    assert read(path, classes=order).labels.tolist() == several[:, [2, 0, 1]].tolist()
    with pytest.raises(DataError, match="expected tubule, duct, podocyte, none; correct"):
        read(path, classes=("tubule", "duct", "podocyte", "none"))


@pytest.mark.parametrize("text", ["", "one\n", "one\ntwo\none\n"])
def test_names_that_make_no_sense(text: str, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(DataError, match="at least two distinct names"):
        read_class_names(tmp_path / "names.txt")
    with pytest.raises(DataError, match=r"nothing\.txt \(.*No such file"):
        read_class_names(tmp_path / "nothing.txt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": None}, "has no 'train_images' but train_labels; expected SPLIT_images"),
        ({"train_labels": None}, "has no 'train_labels' but train_images"),
        ({"train_images": IMAGES.astype(float)}, r"type float64; expected \(N, S, S\) or"),
        ({"train_images": IMAGES[:, :3]}, r"of shape \(6, 3, 4\)"),
        ({"train_images": np.zeros((6, 3, 8, 8), np.uint8)}, r"of shape \(6, 3, 8, 8\)"),
        ({"train_images": np.zeros((6, 8, 8, 8), np.uint8)}, "volumes are not read"),
        ({"train_images": np.zeros((6, 0, 0), np.uint8)}, r"of shape \(6, 0, 0\)"),
        ({"train_images": IMAGES[:0], "train_labels": LABELS[:0]}, "no images in split 'train'"),
        ({"train_images": np.asfortranarray(IMAGES)}, "in Fortran order; expected C order"),
        ({"train_labels": LABELS[:5]}, "has 6 train_images and 5 train_labels"),
        ({"train_labels": LABELS / 2}, r"type float64; expected \(N, 1\) whole numbers"),
        ({"train_labels": LABELS[None]}, r"of shape \(1, 6, 1\)"),
        ({"train_labels": LABELS.astype(int) - 1}, "has the label -1; expected 0 to 1"),
        ({"train_labels": LABELS * 100}, r"up to 200 but none that is 1; .*x\.classes\.txt"),
        ({"train_labels": np.tile(LABELS, 3)}, "the label 2; expected 0 to 1, as there are sev"),
        ({"val_labels": np.tile(LABELS, 3)}, "of different shapes in train, val"),
        ({"train_images": np.array([None] * 6)}, "'train_images' in .* a pickled object array"),
        ({"train_labels": np.array([object()] * 6)}, "'train_labels' in .* never loaded"),
    ],
)
def test_files_that_are_wrong(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    arrays = {"train_images": IMAGES, "train_labels": LABELS} | changes
    present = {key: array for key, array in arrays.items() if array is not None}
    write(tmp_path / "x.npz", **present)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "x.npz")


def test_labels_beyond_the_names(tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz", train_images=IMAGES, train_labels=LABELS)
    with pytest.raises(DataError, match="has the label 2; expected 0 to 1; correct the labels"):
        read(path, classes=("a", "b"))
    several = write(tmp_path / "y.npz", train_images=IMAGES, train_labels=np.tile(LABELS > 1, 3))
    with pytest.raises(DataError, match="has 3 columns for 2 classes"):
        read(several, classes=("a", "b"))


def raw(path: Path, images: bytes) -> Path:
    labels = io.BytesIO()
    npy.write_array(labels, LABELS)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train_images.npy", images)
        archive.writestr("train_labels.npy", labels.getvalue())
    return path


def test_files_that_are_damaged(tmp_path: Path) -> None:
    whole = io.BytesIO()
    npy.write_array(whole, IMAGES)
    read(raw(tmp_path / "whole.npz", whole.getvalue()))
    with pytest.raises(DataError, match="'train_images' cannot be read \\(it ends too early"):
        read(raw(tmp_path / "short.npz", whole.getvalue()[:-3]))
    for name, content in (("empty", b""), ("other", b"\x93NUMPY\x07\x00"), ("junk", b"x" * 99)):
        with pytest.raises(DataError, match="'train_images' cannot be read"):
            read(raw(tmp_path / f"{name}.npz", content))
    (tmp_path / "no.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DataError, match=r"no\.npz \(File is not a zip file\); .*a readable npz"):
        read(tmp_path / "no.npz")


def test_a_bit_that_flipped_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, train_images=IMAGES, train_labels=LABELS)
    content = bytearray(path.read_bytes())
    content[content.index(IMAGES.tobytes()) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"'train_images' cannot be read .*CRC"):
        read(path)
