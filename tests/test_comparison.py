"""The page that compares servers says what the benchmark has printed."""

from __future__ import annotations

import json

from benchmarks import comparison


def test_the_page_is_what_was_measured() -> None:
    results = json.loads(comparison.RESULTS.read_text())
    text = comparison.PAGE.read_text()
    assert comparison.page(text, results) == text
    assert text.count("| litserve |") >= 5
    results["speed"][0]["requests_per_second"] = 12345
    assert comparison.page(text, results) != text
