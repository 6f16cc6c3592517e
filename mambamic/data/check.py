"""What is wrong with a data set before anything is trained on it."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tqdm import tqdm

from mambamic.data.source import SPLITS, Source, Stored, find_splits, open_split
from mambamic.errors import MambamicError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Report: TypeAlias = dict[str, Any]
_IMBALANCED = 10  # times as many images in the largest class as in the smallest
_NEEDED = ("train", "val")  # to train on
_NAMED = 3  # examples of each finding


@dataclass(frozen=True)
class _Facts:
    """What is kept of an image once it was decoded."""

    digest: bytes
    size: tuple[int, int]
    kind: str


@dataclass(frozen=True)
class _Place:
    """Where an image is, and what it is said to show."""

    split: str
    name: str
    label: str

    def as_json(self) -> dict[str, str]:
        return {"split": self.split, "name": self.name, "class": self.label}


def check(data: Path, classes: tuple[str, ...] | None = None, *, progress: bool = True) -> Report:
    """Decode every image of a data set, and report what it holds and what is wrong.

    Exact duplicates are images of equal pixels, in whatever formats and under whatever names.

    Args:
        data: As of ``open_split``.
        classes: As of ``open_split``.
        progress: Whether to show a bar where it takes long and standard error is a terminal.

    Returns:
        An object that JSON can hold. ``problems`` are what spoils a result, ``notes`` what one
        should know: each with what it is, how often, and up to three examples.

    Raises:
        DataError: There is no split, or it cannot be opened.
    """
    with ExitStack() as stack:
        sources = [open_split(data, split, stack, classes) for split in find_splits(data)]
        known = classes or _union(sources)
        places: dict[bytes, list[_Place]] = defaultdict(list)
        splits = {
            source.split: _examine(source, known, places, progress=progress) for source in sources
        }
    twice = [found for found in places.values() if len(found) > 1]
    report: Report = {
        "data": str(data),
        "classes": list(known),
        "multi_label": any(source.multi_label for source in sources),
        "splits": splits,
        "duplicates": [[place.as_json() for place in found] for found in twice],
    }
    report["problems"] = [
        *_leaks(twice, list(splits)),
        *_class_problems(known),
        *_split_problems(splits),
    ]
    report["notes"] = [*_split_notes(report), *_duplicate_notes(twice, list(splits))]
    return report


def _union(sources: Sequence[Source]) -> tuple[str, ...]:
    first = sources[0].classes
    if all(source.classes == first for source in sources):
        return first  # in their own order, which for arrays is not that of the alphabet
    return tuple(sorted({name for source in sources for name in source.classes}))


def _labels(source: Source, row: int | NDArray[np.int64]) -> str:
    if isinstance(row, int):
        return source.classes[row]
    return " + ".join(name for name, on in zip(source.classes, row, strict=True) if on) or "none"


def _facts(stored: Stored) -> _Facts:
    width, height = stored.image.size
    digest = hashlib.blake2b(f"{width} {height} ".encode(), digest_size=16)
    digest.update(stored.image.tobytes())
    return _Facts(digest.digest(), (width, height), stored.kind())


def _examine(
    source: Source,
    classes: tuple[str, ...],
    places: dict[bytes, list[_Place]],
    *,
    progress: bool,
) -> Report:
    """Report on one split, and enter its images by their digests."""
    title = f"checking {source.split}"
    disable = None if progress else True  # None: no bar where standard error is not a terminal
    facts = tqdm(
        source.map(_facts), title, len(source), unit="image", delay=2, disable=disable, leave=False
    )
    sizes: Counter[tuple[int, int]] = Counter()
    kinds: Counter[str] = Counter()
    unreadable = []
    rows = source.labels if source.multi_label else source.labels.tolist()
    for name, row, found in zip(source.names, rows, facts, strict=True):
        if isinstance(found, MambamicError):
            unreadable.append({"name": name, "reason": found.problem})
            continue
        sizes[found.size] += 1
        kinds[found.kind] += 1
        places[found.digest].append(_Place(source.split, name, _labels(source, row)))
    counted = dict(zip(source.classes, _counts(source), strict=True))
    report: Report = {
        "images": len(source),
        "counts": {name: counted.get(name, 0) for name in classes},
        "sizes": [
            {"width": width, "height": height, "images": images}
            for (width, height), images in sizes.most_common()
        ],
        "kinds": dict(kinds.most_common()),
        "unreadable": unreadable,
        "passed_over": list(source.passed_over),
    }
    if source.multi_label:
        report["without_class"] = int((source.labels.sum(1) == 0).sum())
    return report


def _counts(source: Source) -> list[int]:
    if source.multi_label:
        return [int(count) for count in source.labels.sum(0)]
    found = Counter(source.labels.tolist())
    return [found[index] for index in range(len(source.classes))]


def _finding(what: str, examples: Sequence[str] = (), count: int | None = None) -> Report:
    total = len(examples) if count is None else count
    return {"what": what, "count": total, "examples": list(examples[:_NAMED])}


def _class_problems(classes: Sequence[str]) -> Iterator[Report]:
    if len(classes) < 2:
        what = "fewer than two classes: nothing can be trained on this"
        yield _finding(what, [*classes], count=len(classes))


def _split_problems(splits: Report) -> Iterator[Report]:
    for name, split in splits.items():
        if split["images"] == 0:
            yield _finding(f"no images in {name}")
            continue
        bad = [f"{entry['name']}: {entry['reason']}" for entry in split["unreadable"]]
        if bad:
            yield _finding(f"unreadable files in {name}", bad)
        missing = [label for label, count in split["counts"].items() if count == 0]
        if missing:
            yield _finding(f"classes without an image in {name}", missing)


def _leaks(twice: list[list[_Place]], splits: list[str]) -> Iterator[Report]:
    for earlier, later in combinations(splits, 2):
        pairs = []
        for found in twice:
            firsts = [place for place in found if place.split == earlier]
            pairs += [(firsts[0], place) for place in found if firsts and place.split == later]
        if pairs:
            examples = [f"{place.name} is {original.name}" for original, place in pairs]
            yield _finding(f"LEAKAGE: images of {later} that are in {earlier} too", examples)


def _split_notes(report: Report) -> Iterator[Report]:
    splits = report["splits"]
    for name in SPLITS:
        if name not in splits:
            needed = ", and training needs one" * (name in _NEEDED)
            yield _finding(f"there is no {name} split{needed}")
    for name, split in splits.items():
        if split["passed_over"]:
            what = f"files of {name} that are not at CLASS/IMAGE and are passed over"
            yield _finding(what, split["passed_over"])
        if split.get("without_class"):
            yield _finding(f"images of no class in {name}", count=split["without_class"])
    name, split = next(iter(splits.items()))
    present = {label: count for label, count in split["counts"].items() if count}
    if present and max(present.values()) > _IMBALANCED * min(present.values()):
        most, least = max(present, key=present.__getitem__), min(present, key=present.__getitem__)
        ratio = present[most] / present[least]
        sizes = f"({most}: {present[most]}, {least}: {present[least]})"
        yield _finding(
            f"the largest class of {name} is {ratio:.0f} times as large as the smallest {sizes}"
        )


def _duplicate_notes(twice: list[list[_Place]], splits: list[str]) -> Iterator[Report]:
    for split in splits:
        examples = []
        for found in twice:
            inside = [place.name for place in found if place.split == split]
            examples += [f"{name} is {inside[0]}" for name in inside[1:]]
        if examples:
            yield _finding(f"copies of other images within {split}", examples)
    torn = [found for found in twice if len({place.label for place in found}) > 1]
    if torn:
        examples = [", ".join(f"{place.name} ({place.label})" for place in found) for found in torn]
        yield _finding("images that are there under different classes", examples)


def lines(report: Report) -> list[str]:
    """Return the report as lines of text."""
    splits: dict[str, Report] = report["splits"]
    labels = " (several may be right)" if report["multi_label"] else ""
    text = [f"{report['data']}: {len(report['classes'])} classes{labels}", ""]
    width = max(map(len, ["images", *report["classes"]]))
    text.append(" " * width + "".join(f"{name:>9}" for name in splits))
    for label in report["classes"]:
        counts = "".join(f"{split['counts'][label]:9}" for split in splits.values())
        text.append(f"{label:{width}}{counts}")
    text.append(
        f"{'images':{width}}" + "".join(f"{split['images']:9}" for split in splits.values())
    )
    text.append("")
    text += [f"{name}: {_appearance(split)}" for name, split in splits.items()]
    for title in ("problems", "notes"):
        if report[title]:
            text += ["", f"{title}:"]
        for finding in report[title]:
            text += _described(finding)
    if not report["problems"]:
        apart = ", no image is in two splits" if len(splits) > 1 else ""
        text += ["", f"no problems: every file is readable, no split lacks a class{apart}"]
    return text


def _described(finding: Report) -> list[str]:
    count = f": {finding['count']}" if finding["count"] else ""
    examples = [f"    {example}" for example in finding["examples"]]
    more = finding["count"] - len(examples)
    if examples and more > 0:
        examples.append(f"    and {more} more")
    return [f"  {finding['what']}{count}", *examples]


def _appearance(split: Report) -> str:
    kinds = ", ".join(f"{kind} ({count})" for kind, count in split["kinds"].items())
    sizes = [(entry["width"], entry["height"]) for entry in split["sizes"]]
    if not sizes:
        return "nothing readable"
    if len(sizes) == 1:
        return f"{kinds}; all {sizes[0][0]} x {sizes[0][1]} pixels"
    low, high = min(sizes, key=lambda s: s[0] * s[1]), max(sizes, key=lambda s: s[0] * s[1])
    return (
        f"{kinds}; {len(sizes)} sizes from {low[0]} x {low[1]} to {high[0]} x {high[1]} pixels, "
        f"most often {sizes[0][0]} x {sizes[0][1]}"
    )
