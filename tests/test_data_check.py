"""What is said of good data sets, and of every kind of bad one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mambamic.data.check import check, lines

SPLITS = ("train", "val", "test")


def picture(seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Image.Image:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def save(root: Path, name: str, image: Image.Image) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes in three splits, four different images of each."""
    root = tmp_path / "cells"
    for seed in range(24):
        split, label = SPLITS[seed // 8], "ab"[seed % 2]
        save(root, f"{split}/{label}/{seed:02}.png", picture(seed))
    return root


def test_a_data_set_without_fault(data: Path) -> None:
    report = check(data)
    assert report["problems"] == []
    assert report["notes"] == []
    assert report["duplicates"] == []
    assert report["classes"] == ["a", "b"]
    assert report["splits"]["val"] == {
        "images": 8,
        "counts": {"a": 4, "b": 4},
        "sizes": [{"width": 8, "height": 8, "images": 8}],
        "kinds": {"PNG RGB": 8},
        "unreadable": [],
        "passed_over": [],
    }
    assert json.loads(json.dumps(report)) == report
    text = "\n".join(lines(report))
    assert "train      val     test\na" in text
    assert "images        8        8        8" in text
    assert "val: PNG RGB (8); all 8 x 8 pixels" in text
    assert text.endswith("no problems: every file is readable, no split lacks a class, no image "
                         "is in two splits")  # fmt: skip


def test_the_same_pixels_in_another_format_and_split_are_leakage(data: Path) -> None:
    save(data, "test/a/copy.bmp", picture(0))
    save(data, "val/b/copy.tiff", picture(0))
    report = check(data)
    assert [(leak["what"], leak["examples"]) for leak in report["problems"]] == [
        ("LEAKAGE: images of val that are in train too", ["val/b/copy.tiff is train/a/00.png"]),
        ("LEAKAGE: images of test that are in train too", ["test/a/copy.bmp is train/a/00.png"]),
        ("LEAKAGE: images of test that are in val too", ["test/a/copy.bmp is val/b/copy.tiff"]),
    ]
    (group,) = report["duplicates"]
    assert [place["name"] for place in group] == [
        "train/a/00.png", "val/b/copy.tiff", "test/a/copy.bmp",
    ]  # fmt: skip
    (torn,) = report["notes"]
    assert torn["what"] == "images that are there under different classes"
    assert torn["examples"] == ["train/a/00.png (a), val/b/copy.tiff (b), test/a/copy.bmp (a)"]
    text = "\n".join(lines(report))
    assert "problems:\n  LEAKAGE: images of val that are in train too: 1\n    val/b/copy" in text
    assert "no problems" not in text


def test_copies_within_a_split_are_noted(data: Path) -> None:
    for number in range(5):
        save(data, f"train/a/copy{number}.png", picture(0))
    report = check(data)
    assert report["problems"] == []
    assert report["notes"] == [
        {
            "what": "copies of other images within train",
            "count": 5,
            "examples": [f"train/a/copy{number}.png is train/a/00.png" for number in range(3)],
        }
    ]
    assert "    and 2 more" in lines(report)


def test_images_of_equal_bytes_and_other_shape_are_no_copies(data: Path) -> None:
    save(data, "train/a/wide.png", Image.new("RGB", (8, 4), "red"))
    save(data, "val/a/high.png", Image.new("RGB", (4, 8), "red"))
    report = check(data)
    assert report["problems"] == []
    text = "\n".join(lines(report))
    assert "train: PNG RGB (9); 2 sizes from 8 x 4 to 8 x 8 pixels, most often 8 x 8" in text


def test_unreadable_files_and_absent_classes(data: Path) -> None:
    (data / "train/a/cut.png").write_bytes((data / "train/a/00.png").read_bytes()[:60])
    (data / "train/a/notes.txt").write_text("what these are")
    for path in (data / "val/b").iterdir():
        path.unlink()
    report = check(data)
    unreadable = report["splits"]["train"]["unreadable"]
    assert [entry["name"] for entry in unreadable] == ["train/a/cut.png", "train/a/notes.txt"]
    first, second = report["problems"]
    assert (first["what"], first["count"]) == ("unreadable files in train", 2)
    assert first["examples"][0].startswith("train/a/cut.png: a damaged image (")
    assert (second["what"], second["examples"]) == ("classes without an image in val", ["b"])


def test_what_else_one_should_know(data: Path) -> None:
    (data / "train/a/deeper").mkdir()
    save(data, "train/a/deeper/x.png", picture(99))
    for seed in range(100, 145):
        save(data, f"train/a/{seed}.png", picture(seed, mode="L"))
    for path in (data / "test").rglob("*.png"):
        path.unlink()
    for folder in ("a", "b", ""):
        (data / "test" / folder).rmdir()
    report = check(data)
    assert report["problems"] == []
    assert [(note["what"], note["examples"]) for note in report["notes"]] == [
        ("there is no test split", []),
        (
            "files of train that are not at CLASS/IMAGE and are passed over",
            ["train/a/deeper/x.png"],
        ),
        (
            "the largest class of train is 12 times as large as the smallest (a: 49, b: 4)",
            [],
        ),
    ]
    assert "train: PNG L (45), PNG RGB (8); all 8 x 8" in "\n".join(lines(report))


def test_an_empty_split(data: Path) -> None:
    for path in (data / "val").rglob("*.png"):
        path.unlink()
    report = check(data)
    assert [problem["what"] for problem in report["problems"]] == ["no images in val"]
    assert "val: nothing readable" in lines(report)


def test_folders_without_any_image(tmp_path: Path) -> None:
    (tmp_path / "train/a").mkdir(parents=True)
    report = check(tmp_path)
    problems = [problem["what"] for problem in report["problems"]]
    assert problems == [
        "fewer than two classes: nothing can be trained on this",
        "no images in train",
    ]
    assert "images        0" in lines(report)


def test_one_class_alone_spoils_training(data: Path) -> None:
    for split in SPLITS:
        shutil.rmtree(data / split / "b")
    (problem,) = check(data)["problems"]
    assert problem["what"].startswith("fewer than two classes")
    assert (problem["count"], problem["examples"]) == (1, ["a"])


@pytest.mark.parametrize(
    ("split", "note"),
    [
        ("val", "there is no val split, and training needs one"),
        ("test", "there is no test split"),
    ],
)
def test_a_split_that_is_not_there(split: str, note: str, data: Path) -> None:
    shutil.rmtree(data / split)
    assert [found["what"] for found in check(data)["notes"]] == [note]


def arrays(**splits: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for split, (images, labels) in splits.items():
        found |= {f"{split}_images": images, f"{split}_labels": labels}
    return found


def test_arrays(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 28, 28), np.uint8)
    labels = np.arange(12)[:, None] % 11
    np.savez(tmp_path / "x.npz", **arrays(train=(images, labels), val=(images[3:5], labels[3:5])))
    report = check(tmp_path / "x.npz")
    assert report["classes"] == [str(index) for index in range(11)]
    leak, absent = report["problems"]
    assert leak["what"] == "LEAKAGE: images of val that are in train too"
    assert leak["examples"] == ["val[0] is train[3]", "val[1] is train[4]"]
    assert (absent["what"], absent["count"]) == ("classes without an image in val", 9)
    assert report["splits"]["train"]["kinds"] == {"array L": 12}


def test_several_classes_may_be_right(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), np.uint8)
    labels = np.array([[1, 1, 0], [0, 0, 0], [0, 1, 0]])
    np.savez(tmp_path / "x.npz", **arrays(train=(images, labels)))
    report = check(tmp_path / "x.npz", ("one", "two", "three"))
    assert report["splits"]["train"]["counts"] == {"one": 1, "two": 2, "three": 0}
    assert [problem["examples"] for problem in report["problems"]] == [["three"]]
    note = {"what": "images of no class in train", "count": 1, "examples": []}
    assert note in report["notes"]
    assert "  images of no class in train: 1" in lines(report)
    assert lines(report)[0].endswith("x.npz: 3 classes (several may be right)")
