"""Arrange a data set as SPLIT/CLASS/IMAGE: from folders of classes, or from a table of labels.

Images of one group (a patient, a slide, the picture that tiles were cut from) stay in one split.
Which one is decided by the group's name alone, so that a second call does the same.

  python examples/arrange.py cell_images malaria --group-pattern '^[^_]+'
  python examples/arrange.py images mhist --table annotations.csv \
      --image 'Image Name' --label 'Majority Vote Label' --split Partition
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".jp2", ".ppm")
SPLITS = ("train", "val", "test")
STATED = {
    **dict.fromkeys(("train", "training", "1", "true"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing", "0", "false"), "test"),
}


@dataclass(frozen=True)
class Entry:
    """An image, and what is said of it."""

    path: Path
    label: str
    group: str
    split: str | None = None


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("images", type=Path, help="folder of images: a folder per class, unless there is a table")
    add("out", type=Path, help="new folder for train, val and test")
    add("--table", type=Path, metavar="CSV", help="a row per image, with a head")
    add("--delimiter", default=",", help="between its columns (default: ,)")
    add("--image", metavar="COLUMN", help="the image's file name, with or without its ending")
    add("--label", metavar="COLUMN", help="the class")
    add("--split", metavar="COLUMN", help="train, val or test (or 1 and 0 for train and test); "
        "without val, a part of train is set apart")  # fmt: skip
    add("--group", metavar="COLUMN", help="patient, slide or the like")
    add("--group-pattern", metavar="REGEX", help="what in a file's name is the group")
    add("--parts", type=float, nargs=3, default=(0.7, 0.1, 0.2), metavar=("TRAIN", "VAL", "TEST"),
        help="shares of the groups (default: 0.7 0.1 0.2)")  # fmt: skip
    add("--copy", action="store_true", help="copy the files instead of linking to them")
    return made


def find_images(folder: Path) -> list[Path]:
    """Return all image files below a folder."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def from_folders(images: Path, pattern: str | None) -> Iterator[Entry]:
    """Take the folder that an image lies in as its class."""
    for path in find_images(images):
        yield Entry(path, path.parent.name, group_of(path.name, pattern))


def from_table(args: argparse.Namespace) -> Iterator[Entry]:
    """Take class, group and split from the rows of a table."""
    found = {}
    for path in find_images(args.images):
        found[path.name] = found[path.stem] = path
    with args.table.open(newline="", encoding="utf-8-sig") as file:
        for raw in csv.DictReader(file, delimiter=args.delimiter):
            row = {str(key).strip(): str(value).strip() for key, value in raw.items()}
            missing = [c for c in (args.image, args.label, args.split, args.group)
                       if c and c not in row]  # fmt: skip
            if missing:
                sys.exit(f"{args.table} has no column {missing[0]!r} but {', '.join(row)}")
            name = row[args.image]
            if name not in found:
                sys.exit(f"{name!r} in {args.table} is not below {args.images}")
            path = found[name]
            group = row[args.group] if args.group else group_of(path.name, args.group_pattern)
            stated = row[args.split].lower() if args.split else None
            if stated is not None and stated not in STATED:
                sys.exit(f"split {stated!r} of {name!r}; expected one of {', '.join(STATED)}")
            label = row[args.label].replace("/", "-")
            yield Entry(path, label, group, None if stated is None else STATED[stated])


def group_of(name: str, pattern: str | None) -> str:
    """Return the part of a file's name that a pattern finds, or all of it."""
    match = re.search(pattern, name) if pattern else None
    return match[0] if match else name


def choose(group: str, parts: Sequence[float], splits: Sequence[str]) -> str:
    """Return the split of a group: each has its share of the hashes."""
    draw = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64 * sum(parts)
    for part, split in zip(parts, splits, strict=True):
        draw -= part
        if draw < 0:
            return split
    return splits[-1]


def arrange(entries: Sequence[Entry], out: Path, parts: Sequence[float], *, copy: bool) -> None:
    """Put every image in its place."""
    has_val = any(entry.split == "val" for entry in entries)
    for entry in entries:
        split = entry.split
        if split is None:
            split = choose(entry.group, parts, SPLITS)
        elif split == "train" and not has_val:
            split = choose(entry.group, parts[:2], SPLITS[:2])
        target = out / split / entry.label / entry.path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            sys.exit(f"{target} exists: two images have one name, or {out} is not new")
        if copy:
            shutil.copyfile(entry.path, target)
        else:
            target.symlink_to(entry.path.resolve())


def main(argv: Sequence[str] | None = None) -> None:
    """Arrange a data set and print how many images there are of each class."""
    args = parser().parse_args(argv)
    if args.table is not None and not (args.image and args.label):
        parser().error("--table needs --image and --label")
    if args.table is None:
        entries = list(from_folders(args.images, args.group_pattern))
    else:
        entries = list(from_table(args))
    if not entries:
        sys.exit(f"there are no images below {args.images}")
    arrange(entries, args.out, args.parts, copy=args.copy)
    counts = Counter(path.parent.relative_to(args.out) for path in args.out.glob("*/*/*"))
    for place, count in sorted(counts.items()):
        print(f"{place}: {count}")


if __name__ == "__main__":
    main()
