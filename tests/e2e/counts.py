"""What a port of metrics says."""

from __future__ import annotations

import urllib3
from prometheus_client.parser import text_string_to_metric_families as parse

from mambamic import metrics


def exposed(port: int) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Every sample of a port, by name and labels."""
    reply = urllib3.request("GET", f"http://127.0.0.1:{port}/metrics", retries=False, timeout=30)
    assert reply.status == 200
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in parse(reply.data.decode()):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def total(port: int, metric: metrics.Metric, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    samples = exposed(port).get(metric.sample, {})
    return sum(value for stated, value in samples.items() if labels.items() <= dict(stated).items())
