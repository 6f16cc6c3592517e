from __future__ import annotations

import pytest

from mambamic.handlers.stamp import LONGEST_S, seconds_since

NOW = 1_800_000_000.5


@pytest.mark.parametrize(
    "stamp",
    [
        "t=1800000000.250",  # nginx
        "1800000000.25",
        "t=1800000000250",
        "1800000000250",
        "t=1800000000250000",
        "1800000000250000",
        "1800000000250000000",
        "  t=1800000000.250  ",
        "t=1800000000.250, t=1800000000.400",  # two proxies: the outer one was first
    ],
)
def test_stamps_of_all_proxies_are_read(stamp: str) -> None:
    assert seconds_since(stamp, NOW) == pytest.approx(0.25, abs=1e-5)


def test_whole_seconds() -> None:
    assert seconds_since("t=1800000000", NOW) == 0.5


@pytest.mark.parametrize(
    "stamp",
    [
        None,
        "",
        "t=",
        "0",
        "yesterday",
        "t=-1800000000",
        "t=1800000000.2.3",
        "1e9",
        "nan",
        "t=1800000000x",
        "9" * 400,
        "t=١٨٠٠٠٠٠٠٠٠",
        "t=1000000000",  # of long ago
        "t=1900000000",  # of times to come
    ],
)
def test_what_says_nothing_is_unknown_and_not_0(stamp: str | None) -> None:
    assert seconds_since(stamp, NOW) is None


def test_what_is_not_quite_right_is_clamped() -> None:
    assert seconds_since(f"t={NOW + 2:.3f}", NOW) == 0
    assert seconds_since(f"t={NOW - 1800:.3f}", NOW) == LONGEST_S
