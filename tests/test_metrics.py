from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from mambamic import metrics


def test_the_buckets_reach_from_a_millisecond_to_half_a_minute_in_small_steps() -> None:
    bounds = metrics.SECONDS
    assert list(bounds) == sorted(set(bounds))
    assert 0.001 in bounds
    assert bounds[-1] == 30
    from_a_millisecond = [bound for bound in bounds if bound >= 0.001]
    steps = [upper / lower for lower, upper in itertools.pairwise(from_a_millisecond)]
    assert max(steps) <= 1.5


@pytest.mark.parametrize("metric", metrics.ALL, ids=lambda metric: metric.name)
def test_names_follow_the_conventions(metric: metrics.Metric) -> None:
    assert re.fullmatch(r"mambamic_[a-z_]+", metric.name)
    assert not metric.name.endswith("_total")
    assert not re.search(r"_(ms|milliseconds|microseconds|kb|mb|percent)\b", metric.name)
    assert ("duration" in metric.name or "wait" in metric.name) == metric.name.endswith("_seconds")
    # What a worker that has died held is nobody's any more.
    assert metric.kind != "gauge" or metric.mode.startswith("live")


def test_the_documents_list_every_metric_with_its_labels(root: Path) -> None:
    text = (root / "docs" / "metrics.md").read_text(encoding="utf-8")
    row = r"^\| `(mambamic_\w+)` \| (\w+) \|([^|]*)\|"
    rows = re.findall(row, text, re.MULTILINE)
    listed = {name: (kind, re.findall(r"`(\w+)`", labels)) for name, kind, labels in rows}
    assert listed == {
        metric.sample: (
            metric.kind,
            [label for label in metric.labels if label not in metrics.MODEL],
        )
        for metric in metrics.ALL
    }
