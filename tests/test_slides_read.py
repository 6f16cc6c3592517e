from __future__ import annotations

import os
import queue
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from mambamic.preprocess import Preprocess
from mambamic.slides.grid import lay_out, positions
from mambamic.slides.pool import Batch, ReaderPool
from mambamic.slides.read import DIED, Place, Source, TileReader
from mambamic.slides.source import open_slide

from .slide_files import blobs, write_slide

SIZE = 48
LOOK = Preprocess(input_size=SIZE)


def _work(path: Path, tile: int = 224) -> tuple[Source, list[Place]]:
    slide = open_slide(path)
    slide.close()
    layout = lay_out(slide.info, tile, tile, 1)
    x, y = positions(slide.info, layout)
    corners = zip(x.tolist(), y.tolist(), strict=True)
    places = [Place(at, *corner) for at, corner in enumerate(corners)]
    return Source(path, False, layout.level, layout.read_size, LOOK), places


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_slide(tmp_path / "s.tiff", (2048, 1024), 2, blobs([(900, 500, 400)]))


@pytest.fixture
def pool() -> Iterator[ReaderPool]:
    with ReaderPool(2, 16, SIZE) as pool:
        yield pool


def _read_all(pool: ReaderPool, source: Source, places: list[Place]) -> tuple[np.ndarray, Batch]:
    batch = Batch(source, [Place(at, p.x, p.y) for at, p in enumerate(places)])
    assert pool.submit(batch, 10)
    while True:
        assert pool.failure is None
        try:
            done = pool.ready.get(timeout=1)
        except queue.Empty:
            continue
        pixels = pool.pixels(done).copy()
        pool.release(done)
        return pixels, done


def test_one_bad_tile_does_not_poison_the_others(data_dir: Path) -> None:
    source, places = _work(data_dir / "slides" / "CMU-1-Small-Region.corrupt.svs")
    assert len(places) == 117
    pixels = np.zeros((117, SIZE, SIZE, 3), np.uint8)
    reader = TileReader()
    report = reader.read(source, places, pixels)
    good_source, _ = _work(data_dir / "slides" / "CMU-1-Small-Region.svs")
    whole = np.zeros_like(pixels)
    assert not reader.read(good_source, places, whole).failures
    reader.close()
    bad = [failure.at for failure in report.failures]
    assert len(bad) <= 10
    assert {failure.status for failure in report.failures} == {"unreadable"}
    assert all("cannot be read" in failure.message for failure in report.failures)
    good = np.setdiff1d(np.arange(117), bad)
    assert np.array_equal(pixels[good], whole[good])
    assert not pixels[bad].any(), "no pixels are invented"


def test_png_files_are_the_pixels(slide: Path) -> None:
    import dataclasses

    from mambamic.images import decode

    source, places = _work(slide)
    reader = TileReader()
    pixels = np.zeros((4, SIZE, SIZE, 3), np.uint8)
    reader.read(source, places[:4], pixels)
    files = reader.read(dataclasses.replace(source, encode=True), places[:4], None).files
    reader.close()
    for at in range(4):
        assert np.array_equal(np.asarray(decode(files[at])), pixels[at])


def test_a_slide_that_vanishes_gives_reasons(slide: Path) -> None:
    source, places = _work(slide)
    slide.unlink()
    report = TileReader().read(source, places[:3], np.zeros((3, SIZE, SIZE, 3), np.uint8))
    assert [failure.at for failure in report.failures] == [0, 1, 2]
    assert "is not there" in report.failures[0].message


def test_readers_give_what_one_reader_gives(pool: ReaderPool, slide: Path) -> None:
    source, places = _work(slide)
    expected = np.zeros((len(places), SIZE, SIZE, 3), np.uint8)
    TileReader().read(source, places, expected)
    for start in range(0, len(places), 16):
        some = places[start : start + 16]
        pixels, batch = _read_all(pool, source, some)
        assert np.array_equal(pixels, expected[start : start + len(some)])
        assert batch.report.read_s > 0


def _children() -> list[int]:
    children = psutil.Process().children()
    return [p.pid for p in children if "mambamic.slides.reader_process" in p.cmdline()]


def test_a_killed_reader_is_replaced_and_its_tiles_are_read_again(
    pool: ReaderPool, slide: Path
) -> None:
    source, places = _work(slide)
    victims = _children()
    assert len(victims) == 2
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    pixels, batch = _read_all(pool, source, places[:16])
    assert not batch.report.failures
    assert pixels.any(axis=(1, 2, 3)).all()
    assert not set(_children()) & set(victims)


def _kill_the_hung_twice() -> None:
    for _ in range(2):
        time.sleep(1)
        for child in _children():
            state = Path(f"/proc/{child}/wchan").read_text()
            if "wait_for_partner" in state or "fifo" in state:
                os.kill(child, signal.SIGKILL)


def test_a_tile_that_kills_its_reader_twice_is_reported_alone(
    pool: ReaderPool, slide: Path, tmp_path: Path
) -> None:
    """A named pipe in the place of a slide: whoever opens it hangs, and is killed here."""
    source, places = _work(slide)
    trap = tmp_path / "trap.tiff"
    os.mkfifo(trap)
    hung = Source(trap, False, 0, 224, LOOK)
    batch = Batch(hung, [Place(0, 0, 0)])
    assert pool.submit(batch, 10)
    _kill_the_hung_twice()
    done = pool.ready.get(timeout=30)
    assert [(failure.at, failure.status) for failure in done.report.failures] == [(0, DIED)]
    pool.release(done)
    assert not _read_all(pool, source, places[:16])[1].report.failures


def test_what_waits_behind_a_tile_that_kills_its_reader_is_not_to_blame(
    slide: Path, tmp_path: Path
) -> None:
    source, places = _work(slide)
    trap = tmp_path / "trap.tiff"
    os.mkfifo(trap)
    with ReaderPool(1, 2, SIZE) as pool:
        assert pool.submit(Batch(Source(trap, False, 0, 224, LOOK), [Place(0, 0, 0)], "trap"), 10)
        assert pool.submit(Batch(source, [Place(0, *places[0][1:3])], "slide"), 10)
        _kill_the_hung_twice()
        done = [pool.ready.get(timeout=30) for _ in range(2)]
    failed = {batch.note: [one.status for one in batch.report.failures] for batch in done}
    assert failed == {"trap": [DIED], "slide": []}


def test_memory_is_bounded_and_submitting_waits_for_it(slide: Path) -> None:
    source, places = _work(slide)
    with ReaderPool(1, 8, SIZE) as pool:
        assert pool.memory_bytes <= 4 * 8 * SIZE * SIZE * 3
        accepted = 0
        while pool.submit(Batch(source, places[:8]), 0.05):
            accepted += 1
            assert accepted < 10
        pool.release(pool.ready.get(timeout=30))
        assert pool.submit(Batch(source, places[:8]), 5)
