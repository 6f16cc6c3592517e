"""Batches of any size through captured graphs: every answer is the image's own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mambamic.graph.replay import BUCKETS, Replay, bucketed

IMAGE = (8, 8, 3)


@pytest.mark.parametrize(
    ("count", "parts"),
    [
        (0, []),
        (1, [(1, 1)]),
        (3, [(3, 4)]),
        (32, [(32, 32)]),
        (33, [(33, 48)]),
        (257, [(256, 256), (1, 1)]),
        (600, [(256, 256), (256, 256), (88, 96)]),
    ],
)
def test_few_batch_sizes(count: int, parts: list[tuple[int, int]]) -> None:
    assert list(bucketed(count, BUCKETS)) == parts


def test_every_image_is_in_a_batch() -> None:
    for buckets in ((1,), (1, 20), BUCKETS):
        for count in range(600):
            batches = list(bucketed(count, buckets))
            assert sum(images for images, _ in batches) == count
            assert all(images <= size and size in buckets for images, size in batches)


def total(pixels: Tensor) -> Tensor:
    """Stand for a network: every image's own numbers, and no two alike."""
    return pixels.float().flatten(1)[:, :5] * 3 + pixels.float().mean(dim=(1, 2, 3)).unsqueeze(1)


def images(count: int, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(0, 256, (count, *IMAGE), np.uint8)


def expected(pixels: NDArray[Any]) -> NDArray[Any]:
    return total(torch.from_numpy(pixels.copy())).numpy()


def make(function: Callable[[Tensor], Tensor] = total, max_batch: int = 32) -> Replay:
    return Replay(function, IMAGE, 5, torch.device("cuda:0"), max_batch)


@pytest.mark.gpu
def test_any_batch_gives_each_image_its_own_result() -> None:
    replay = make()
    for count in (0, 1, 2, 3, 31, 32, 33, 257, 100, 1):
        pixels = images(count, seed=count)
        np.testing.assert_allclose(replay(pixels), expected(pixels), rtol=1e-6)


@pytest.mark.gpu
def test_pinned_strided_and_read_only_pixels() -> None:
    replay, pixels = make(), images(70)
    pinned = torch.from_numpy(pixels).pin_memory().numpy()
    frozen = pixels.copy()
    frozen.flags.writeable = False
    mirrored = np.ascontiguousarray(pixels[:, :, ::-1])[:, :, ::-1]
    for same in (pinned, frozen, mirrored):
        np.testing.assert_allclose(replay(same), expected(pixels), rtol=1e-6)


@pytest.mark.gpu
def test_threads_get_their_own_results() -> None:
    replay = make()
    failures: list[int] = []

    def work(seed: int) -> None:
        for turn in range(30):
            pixels = images(1 + (seed * 7 + turn * 5) % 70, seed * 100 + turn)
            if not np.allclose(replay(pixels), expected(pixels), rtol=1e-6):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.gpu
def test_after_an_error_it_answers_again() -> None:
    def picky(pixels: Tensor) -> Tensor:
        if len(pixels) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return total(pixels)

    replay = make(picky)
    with pytest.raises(torch.OutOfMemoryError):
        replay(images(40))  # 32, and then 8
    for count in (4, 32, 36):
        np.testing.assert_allclose(replay(images(count)), expected(images(count)), rtol=1e-6)
