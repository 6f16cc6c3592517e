"""What a run saw, counted by status, as JSON: Locust's own figures mix 429 and 200."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any


class Record:
    """Counts and times of all requests of a run."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.faults: Counter[str] = Counter()
        self._first = self._last = time.monotonic()
        self._times: defaultdict[int, list[float]] = defaultdict(list)

    def add(self, status: int, seconds: float, fault: str | None) -> None:
        """Count one request that has just ended."""
        self._last = time.monotonic()
        if not self._times:
            self._first = self._last - seconds
        self.statuses[status] += 1
        self._times[status].append(seconds)
        if fault is not None:
            self.faults[fault] += 1

    def as_json(self, seconds: float | None = None) -> dict[str, Any]:
        """Return the figures of a run.

        Args:
            seconds: That it took; by default from the first request to the last answer.
        """
        seconds = max(1e-3, self._last - self._first) if seconds is None else seconds
        good = sorted(self._times[200])
        return {
            "seconds": round(seconds, 1),
            "requests": self.statuses.total(),
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "faults": dict(self.faults),
            "good_per_second": round(len(good) / seconds, 1),
            "p50_s": _at(good, 0.5),
            "p99_s": _at(good, 0.99),
            "slowest_s": round(max(map(max, filter(None, self._times.values())), default=0.0), 3),
        }

    def write(self, path: Path) -> None:
        """Write the figures to a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")


def _at(times: list[float], share: float) -> float | None:
    return round(times[int(share * (len(times) - 1))], 4) if times else None
