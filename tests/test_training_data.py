"""Image folders, zips and arrays as training reads them, and the batches made of them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mambamic.errors import DataError
from mambamic.preprocess import Preprocess
from mambamic.training.data import Batches, Split, load_split

COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (220, 30, 20)}
PREPROCESS = Preprocess(input_size=8)
Writer = Callable[[Path, dict[str, bytes]], Path]


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (10, 12), colour).save(buffer, "PNG")
    return buffer.getvalue()


def contents(split: str = "train", each: int = 3) -> dict[str, bytes]:
    """Files by name; each image differs a little from the others."""
    return {
        f"{split}/{name}/{index}.png": png((colour[0], colour[1], colour[2] + index))
        for name, colour in COLOURS.items()
        for index in range(each)
    }


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_zip(root: Path, files: dict[str, bytes], split: str = "train") -> Path:
    with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return root


WRITERS = pytest.mark.parametrize("write", [write_folder, write_zip], ids=["folder", "zip"])


@WRITERS
def test_a_split(write: Writer, tmp_path: Path) -> None:
    files = dict(reversed(contents().items()))
    split = load_split(write(tmp_path, files), "train", PREPROCESS)
    assert split.classes == ("blue", "green", "red")
    assert split.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert split.labels.dtype == torch.int64
    assert split.pixels.dtype == torch.uint8
    assert len(split) == 9
    assert not split.multi_label
    assert split.names == tuple(
        f"train/{name}/{index}.png" for name in COLOURS for index in range(3)
    )
    expected = [
        (colour[0], colour[1], colour[2] + index)
        for colour in COLOURS.values()
        for index in range(3)
    ]
    uniform = torch.tensor(expected, dtype=torch.uint8)[:, None, None].expand(9, 8, 8, 3)
    assert torch.equal(split.pixels, uniform)


def test_more_images_than_are_decoded_at_once(tmp_path: Path) -> None:
    files = {
        f"train/{name}/{index:03}.png": png((index, 7, number))
        for number, name in enumerate(("a", "b"))
        for index in range(150)
    }
    split = load_split(write_zip(tmp_path, files), "train", PREPROCESS)
    assert split.pixels[:, 0, 0, 0].tolist() == [*range(150), *range(150)]
    assert split.pixels[:, 0, 0, 2].tolist() == split.labels.tolist() == [0] * 150 + [1] * 150


def test_the_rule_of_resizing_is_applied(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((40, 20), 90).convert("RGB").save(buffer, "PNG")
    files = contents(each=1) | {"train/red/wide.png": buffer.getvalue()}
    rule = Preprocess(input_size=16, resize="shorter_side")
    split = load_split(write_folder(tmp_path, files), "train", rule)
    with Image.open(buffer) as image:
        assert np.array_equal(split.pixels[3].numpy(), rule.pixels(image))


@WRITERS
def test_hidden_files_and_folders_are_passed_over(write: Writer, tmp_path: Path) -> None:
    hidden = {
        "train/red/.DS_Store": b"x",
        "train/.ipynb_checkpoints/0.png": png((1, 1, 1)),
        "__MACOSX/train/red/._0.png": b"x",
    }
    split = load_split(write(tmp_path, contents(each=1) | hidden), "train", PREPROCESS)
    assert split.classes == ("blue", "green", "red")
    assert len(split) == 3


def test_a_zip_may_hold_the_split_in_a_folder(tmp_path: Path) -> None:
    nested = {f"data/cells/{name}": data for name, data in contents(each=1).items()}
    assert len(load_split(write_zip(tmp_path, nested), "train", PREPROCESS)) == 3


def test_a_zip_of_all_splits(tmp_path: Path) -> None:
    write_zip(tmp_path, contents("train") | contents("val", each=1), "cells")
    assert len(load_split(tmp_path / "cells.zip", "train", PREPROCESS)) == 9
    assert len(load_split(tmp_path / "cells.zip", "val", PREPROCESS)) == 3
    with pytest.raises(DataError, match=r"cells\.zip has no folder test/"):
        load_split(tmp_path / "cells.zip", "test", PREPROCESS)


def test_classes_in_an_order_of_their_own(tmp_path: Path) -> None:
    write_folder(tmp_path, contents(each=1))
    classes = ("red", "none", "green", "blue")
    split = load_split(tmp_path, "train", PREPROCESS, classes=classes)
    assert split.classes == classes
    assert split.labels.tolist() == [3, 2, 0]
    with pytest.raises(DataError, match=r"the classes red; expected none but blue, green"):
        load_split(tmp_path, "train", PREPROCESS, classes=("blue", "green"))


def test_arrays_are_what_the_same_images_are_as_files(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (300, 12, 12), np.uint8)
    labels = (np.arange(300) % 3)[:, None]
    np.savez_compressed(tmp_path / "cells.npz", train_images=images, train_labels=labels)
    for index, image in enumerate(images):
        folder = tmp_path / f"train/{index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index:03}.png")
    arrays = load_split(tmp_path / "cells.npz", "train", PREPROCESS)
    files = load_split(tmp_path, "train", PREPROCESS)
    assert arrays.classes == files.classes == ("0", "1", "2")
    assert arrays.names[:2] == ("train[0]", "train[1]")
    by_label = torch.argsort(arrays.labels, stable=True)
    assert torch.equal(arrays.labels[by_label], files.labels)
    assert torch.equal(arrays.pixels[by_label], files.pixels)


def test_arrays_in_which_several_classes_may_be_right(tmp_path: Path) -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    labels = np.array([[0, 1, 1], [0, 0, 0]], np.uint8)
    np.savez(tmp_path / "chest.npz", val_images=images, val_labels=labels)
    split = load_split(tmp_path / "chest.npz", "val", PREPROCESS)
    assert split.multi_label
    assert split.labels.tolist() == labels.tolist()
    assert split.labels.dtype == torch.int64
    assert split.to(torch.device("cpu")).multi_label


def test_arrays_of_one_class(tmp_path: Path) -> None:
    images, labels = np.zeros((2, 8, 8), np.uint8), np.zeros((2, 1), np.uint8)
    np.savez(tmp_path / "one.npz", train_images=images, train_labels=labels)
    with pytest.raises(DataError, match=r"one\.npz has 2 images of 1 classes in split 'train'"):
        load_split(tmp_path / "one.npz", "train", PREPROCESS)


def test_a_missing_split(tmp_path: Path) -> None:
    write_folder(tmp_path, contents())
    with pytest.raises(DataError, match=r"has neither val/ nor val\.zip; expected SPLIT/CLASS/"):
        load_split(tmp_path, "val", PREPROCESS)


@WRITERS
@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["train/red/0.png", "train/red/1.png"], "2 images of 1 classes"),
        (["train/0.png", "train/1.png"], "0 images of 0 classes"),
        (["train/cells/red/0.png", "train/cells/blue/0.png"], "0 images of 0 classes"),
        (["train/red/"], "0 images of 0 classes"),
    ],
    ids=["one class", "no classes", "too deep", "empty"],
)
def test_other_layouts_are_refused(
    write: Writer, names: list[str], found: str, tmp_path: Path
) -> None:
    if write is write_folder and names == ["train/red/"]:
        (tmp_path / "train/red").mkdir(parents=True)
        names = []
    write(tmp_path, {name: b"" if name.endswith("/") else png((1, 2, 3)) for name in names})
    with pytest.raises(DataError, match=f"{found} in split 'train'.*SPLIT/CLASS/IMAGE"):
        load_split(tmp_path, "train", PREPROCESS)


@WRITERS
def test_unreadable_images_are_named(write: Writer, tmp_path: Path) -> None:
    files = contents() | {"train/red/bad.png": b"not an image", "train/red/cut.png": b""}
    with pytest.raises(DataError) as caught:
        load_split(write(tmp_path, files), "train", PREPROCESS)
    assert caught.value.problem.startswith("2 of 11 images of split 'train' cannot be read (")
    assert "train/red/bad.png: " in caught.value.problem
    assert "train/red/cut.png: " in caught.value.problem
    assert "0.png" not in caught.value.problem


def test_five_unreadable_images_are_enough(tmp_path: Path) -> None:
    files = contents() | {f"train/red/x{index}.png": b"no" for index in range(9)}
    with pytest.raises(DataError, match=r"^9 of 18 .*x4\.png: ") as caught:
        load_split(write_folder(tmp_path, files), "train", PREPROCESS)
    assert "x5.png" not in str(caught.value)


def test_a_damaged_zip(tmp_path: Path) -> None:
    (tmp_path / "train.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DataError, match=r"train\.zip \(.*\); expected a readable zip"):
        load_split(tmp_path, "train", PREPROCESS)


def test_a_zip_with_one_damaged_file(tmp_path: Path) -> None:
    files = contents()
    path = write_zip(tmp_path, files) / "train.zip"
    data = path.read_bytes()
    where = data.index(files["train/red/1.png"])
    path.write_bytes(data[: where + 40] + b"????" + data[where + 44 :])
    with pytest.raises(DataError, match=r"^1 of 9 .*train/red/1\.png: it cannot be read"):
        load_split(tmp_path, "train", PREPROCESS)


def numbered(count: int) -> Split:
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3)
    return Split(pixels.contiguous(), torch.arange(count) % 2, ("a", "b"))


def order(batches: Batches) -> list[int]:
    return [int(pixel) for pixels, _ in batches for pixel in pixels[:, 0, 0, 0]]


def sizes(batches: Batches) -> list[int]:
    return [len(labels) for _, labels in batches]


def test_validation_keeps_the_order_and_the_last_batch() -> None:
    batches = Batches(numbered(10), 4, None)
    assert sizes(batches) == [4, 4, 2]
    assert len(batches) == 3
    assert order(batches) == list(range(10))


def test_training_drops_the_last_smaller_batch() -> None:
    batches = Batches(numbered(10), 4, 0)
    assert sizes(batches) == [4, 4]
    assert len(batches) == 2
    assert len(set(order(batches))) == 8


def test_every_image_comes_once_and_with_its_label() -> None:
    batches = Batches(numbered(12), 4, 5)
    assert sorted(order(batches)) == list(range(12))
    for pixels, labels in batches:
        assert torch.equal(pixels[:, 0, 0, 0] % 2, labels)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    batches = Batches(numbered(64), 16, 3)
    first = order(batches)
    torch.manual_seed(99)
    assert order(batches) == first
    assert first != list(range(64))
    batches.epoch = 1
    second = order(batches)
    assert second != first
    again = Batches(numbered(64), 8, 3)
    again.epoch = 1
    assert order(again) == second
    again.epoch = 0
    assert order(again) == first
    assert order(Batches(numbered(64), 16, 4)) != first


@pytest.mark.parametrize("seed", [None, 0])
def test_fewer_images_than_a_batch(seed: int | None) -> None:
    batches = Batches(numbered(3), 256, seed)
    assert sizes(batches) == [3]
    assert len(batches) == 1
