"""What is to be said of a slide in a few lines: counted from its table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mambamic.slides.table import PREFIX

SUMMARY = "summary.json"
_LISTED = 1000  # failures; all of them are in the table
_BINS = 20


@dataclass
class Tally:
    """Counts over the parts of a table, added one by one.

    Args:
        classes: Names, in order.
    """

    classes: list[str]
    tiles: int = 0
    by_status: dict[str, int] = field(default_factory=dict)
    tops: dict[str, int] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sums = np.zeros(len(self.classes))
        self.confidence: NDArray[np.int64] = np.zeros(_BINS, np.int64)

    def add(self, table: pa.Table) -> None:
        """Count a part."""
        self.tiles += table.num_rows
        for status, count in _counts(table["status"]).items():
            self.by_status[status] = self.by_status.get(status, 0) + count
        for label, count in _counts(table["top_class"].drop_null()).items():
            self.tops[label] = self.tops.get(label, 0) + count
        scores = np.stack([table[PREFIX + name].drop_null().to_numpy() for name in self.classes])
        self.sums += scores.sum(axis=1)
        self.confidence += np.histogram(scores.max(axis=0), _BINS, (0, 1))[0]
        if len(self.failures) < _LISTED:
            names = [
                c
                for c in ("tile", "name", "x", "y", "status", "message")
                if c in table.schema.names
            ]
            bad = table.select(names).filter(pa.compute.not_equal(table["status"], "ok"))
            self.failures += bad.slice(0, _LISTED - len(self.failures)).to_pylist()

    @property
    def good(self) -> int:
        """Tiles with scores."""
        return self.by_status.get("ok", 0)

    def as_json(self) -> dict[str, Any]:
        """Return the counts."""
        return {
            "tiles": self.tiles,
            "scored": self.good,
            "bad": self.tiles - self.good,
            "by_status": self.by_status,
            "classes": {
                name: {
                    "tiles": self.tops.get(name, 0),
                    "share": self.tops.get(name, 0) / self.good if self.good else None,
                    "mean_probability": float(total / self.good) if self.good else None,
                }
                for name, total in zip(self.classes, self.sums, strict=True)
            },
            "confidence_histogram": self.confidence.tolist(),
            "failures": self.failures,
        }


def _counts(column: Any) -> dict[str, int]:
    return {entry["values"]: entry["counts"] for entry in column.value_counts().to_pylist()}


def verdict(tally: Tally, max_bad: float, why_none: str | None) -> tuple[str, str | None]:
    """Tell how a slide went: ``ok``, ``empty`` or ``failed``, and why.

    Args:
        tally: Of all its tiles.
        max_bad: Largest share of tiles without scores.
        why_none: Why it has no tiles.
    """
    if not tally.tiles:
        return "empty", why_none
    bad = tally.tiles - tally.good
    if bad > max_bad * tally.tiles:
        said = tally.failures[0]["message"] if tally.failures else "no reason"
        return "failed", (
            f"{bad} of {tally.tiles} tiles have no scores ({bad / tally.tiles:.1%}, at most "
            f"{max_bad:.1%} are allowed by --max-bad-tiles); the first: {said}"
        )
    return "ok", None
