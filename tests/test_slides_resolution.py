from __future__ import annotations

from typing import Any

import pytest

from mambamic.slides.resolution import (
    Resolution,
    ResolutionError,
    best_level,
    find_resolution,
)


def _find(**stated: Any) -> Resolution:
    known = {"manifest": None, "flag": None, "metadata": None, "objective": None, "needed": True}
    return find_resolution(**{**known, **stated})


def test_whose_word_counts() -> None:
    everything: dict[str, Any] = {
        "manifest": 0.3,
        "flag": 0.4,
        "metadata": (0.25, 0.25),
        "objective": 20.0,
    }
    for source, mpp in (
        ("manifest", 0.3),
        ("flag", 0.4),
        ("metadata", 0.25),
        ("objective (a guess)", 0.5),
    ):
        assert _find(**everything) == Resolution(mpp, source)
        everything.pop(source.split()[0])


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({}, "no microns per pixel"),
        ({"metadata": (352.8, 352.8)}, r"352\.8 .*dots per inch"),
        ({"metadata": (0.25, 0.5)}, "0.25 across and 0.5 down"),
        ({"manifest": 0.001}, r"0\.001 \(from the manifest\)"),
        ({"flag": 30.0}, r"30 \(from the flag\)"),
        ({"flag": float("nan")}, "nan"),
        ({"objective": 0.1}, "guessed"),
    ],
)
def test_unknown_and_absurd_ones_are_refused(stated: dict[str, Any], said: str) -> None:
    with pytest.raises(ResolutionError, match=said) as caught:
        _find(**stated)
    assert "--mpp" in str(caught.value)


def test_where_it_is_not_needed_an_absurd_one_is_unknown_but_a_stated_one_is_checked() -> None:
    assert _find(metadata=(352.8, 352.8), needed=False) == Resolution(None, "unknown")
    assert _find(needed=False) == Resolution(None, "unknown")
    with pytest.raises(ResolutionError):
        _find(flag=352.8, needed=False)


@pytest.mark.parametrize(
    ("ratio", "level"),
    [(0.5, 0), (1, 0), (1.9, 0), (2, 1), (3.98, 2), (3.9, 1), (4, 2), (100, 3)],
)
def test_the_best_level_is_the_coarsest_that_is_fine_enough(ratio: float, level: int) -> None:
    assert best_level((1, 2, 4.01, 16), ratio) == level
