"""Opening a device's libraries beside other work; a CPU has some, too."""

from __future__ import annotations

import weakref

import pytest
import torch

from mambamic.graph import gpu
from mambamic.graph.gpu import opening_libraries

DEVICE = torch.device("cpu")


class _Network:
    """Something large."""


def _full(device: torch.device) -> None:
    raise torch.OutOfMemoryError(f"{device} is full")


def test_the_blocks_failure_is_the_one_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with opening_libraries(DEVICE):
        pass
    monkeypatch.setattr(gpu, "_open_libraries", _full)
    with pytest.raises(KeyError, match="weights"), opening_libraries(DEVICE):
        raise KeyError("weights")


def test_a_full_device_keeps_nothing_of_what_the_block_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "_open_libraries", _full)
    made: list[weakref.ref[_Network]] = []

    def load() -> None:
        with opening_libraries(DEVICE):
            network = _Network()
            made.append(weakref.ref(network))

    with pytest.raises(torch.OutOfMemoryError, match="cpu is full"):
        load()
    assert made[0]() is None
