"""Which part of every batch a process trains on, where several train together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Share:
    """One of several equal parts.

    Args:
        rank: Which, from 0.
        ranks: How many.
    """

    rank: int = 0
    ranks: int = 1

    def of(self, whole: Tensor) -> Tensor:
        """Return this part of the first axis, which divides evenly."""
        part = len(whole) // self.ranks
        return whole[self.rank * part : (self.rank + 1) * part]
