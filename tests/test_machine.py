from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from mambamic.machine import usable_cpus, usable_memory

TOTAL = psutil.virtual_memory().total


def test_without_limits_it_is_what_the_machine_has(tmp_path: Path) -> None:
    assert usable_memory(tmp_path) == TOTAL
    assert usable_cpus(tmp_path) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("stated", "usable"), [("max", TOTAL), ("1073741824", 1 << 30), (str(1 << 60), TOTAL)]
)
def test_the_memory_of_a_container(tmp_path: Path, stated: str, usable: int) -> None:
    (tmp_path / "memory.max").write_text(f"{stated}\n", encoding="ascii")
    assert usable_memory(tmp_path) == usable


@pytest.mark.parametrize(
    ("stated", "usable"),
    [
        ("max 100000", 16),
        ("200000 100000", 2),
        ("150000 100000", 1),
        ("20000 100000", 1),
        ("100000 20000", 5),
        ("9900000 100000", 16),
    ],
)
def test_the_processors_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: str, usable: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    (tmp_path / "cpu.max").write_text(f"{stated}\n", encoding="ascii")
    assert usable_cpus(tmp_path) == usable


def test_threads_are_counted_by_what_this_process_may_use(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert usable_cpus(tmp_path) == 1
    finally:
        os.sched_setaffinity(0, allowed)
