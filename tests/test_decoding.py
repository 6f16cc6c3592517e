"""Batches decoded in threads and in processes, and decoders that die."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mambamic import decoding
from mambamic.decoding import DecodePool, decode_pixels
from mambamic.errors import DecodeError, RequestError, ServerError, TooLargeError
from mambamic.images import to_rgb
from mambamic.preprocess import Preprocess

PREPROCESS = Preprocess(32)


def blob(seed: int) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


BLOBS = [blob(seed) for seed in range(20)]


@pytest.fixture(params=[0, 2], ids=["threads", "processes"])
def pool(request: pytest.FixtureRequest) -> Iterator[DecodePool]:
    with DecodePool(PREPROCESS, processes=request.param, max_pixels=5000) as opened:
        yield opened


def children() -> list[int]:
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return [int(pid) for pid in text.split()]


def assert_same(results: Sequence[object], blobs: Sequence[bytes]) -> None:
    assert len(results) == len(blobs)
    for result, data in zip(results, blobs, strict=True):
        assert isinstance(result, np.ndarray)
        assert (result == decode_pixels(PREPROCESS, data)).all()


def test_order_is_kept(pool: DecodePool) -> None:
    assert_same(list(pool.map(BLOBS)), BLOBS)
    assert pool.map([]) == []


def test_errors_are_returned_in_their_place(pool: DecodePool) -> None:
    large = io.BytesIO()
    Image.new("L", (100, 100)).save(large, "PNG")
    results = pool.map([BLOBS[0], b"no image", b"", large.getvalue(), bytearray(BLOBS[1])])
    kinds = [type(result) for result in results]
    assert kinds == [np.ndarray, DecodeError, RequestError, TooLargeError, np.ndarray]
    assert str(results[2]) == str(decode_pixels(PREPROCESS, b""))


def test_both_steps_are_timed_and_of_what_cannot_be_read_none(pool: DecodePool) -> None:
    good, bad = pool.timed([BLOBS[0], b"junk"])
    assert good.decode_s > 0
    assert good.preprocess_s > 0
    assert not isinstance(good.result, DecodeError)
    assert isinstance(bad.result, DecodeError)
    assert (bad.decode_s, bad.preprocess_s) == (0, 0)


def test_batches_from_several_threads(pool: DecodePool) -> None:
    results: dict[int, list[object]] = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: list(pool.map(BLOBS[i:]))}))
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for start, result in results.items():
        assert_same(result, BLOBS[start:])
    assert len(results) == 6


def test_decoder_that_dies_is_replaced() -> None:
    with DecodePool(PREPROCESS, processes=2) as pool:
        before = set(children())
        victim = pool._decoders[0].process
        os.kill(victim.pid, signal.SIGKILL)
        assert_same(list(pool.map(BLOBS)), BLOBS)
        after = set(children())
        assert victim.pid not in after
        assert len(after) == len(before)
        assert_same(list(pool.map(BLOBS)), BLOBS)


@pytest.mark.parametrize("deaths", [1, 2])
def test_decoder_that_dies_at_work(deaths: int, monkeypatch: pytest.MonkeyPatch) -> None:
    deadly = BLOBS[3]
    with DecodePool(PREPROCESS, processes=2) as pool:
        connections = type(pool._decoders[0].connection)
        send = connections.send_bytes
        left = [deaths]

        # The decoder that gets this image is killed, as a bug in a codec would; stopped first, so
        # that it cannot answer before.
        def send_and_kill(connection: Connection, data: bytes) -> None:
            (pid,) = (d.process.pid for d in pool._decoders if d.connection is connection)
            if data == deadly and left[0]:
                left[0] -= 1
                os.kill(pid, signal.SIGSTOP)
                send(connection, data)
                os.kill(pid, signal.SIGKILL)
            else:
                send(connection, data)

        monkeypatch.setattr(connections, "send_bytes", send_and_kill)
        results = list(pool.map(BLOBS))
        assert left == [0]
        if deaths == 2:
            assert isinstance(results[3], DecodeError)
            assert "died twice" in str(results[3])
            results[3] = decode_pixels(PREPROCESS, deadly)
        assert_same(results, BLOBS)


def test_interrupted_batch_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with DecodePool(PREPROCESS, processes=2) as pool:
        with monkeypatch.context() as patched:
            receive = type(pool._decoders[0]).receive
            answers = iter(range(5))

            def interrupted(decoder: object) -> object:
                if next(answers) == 4:
                    raise KeyboardInterrupt
                return receive(decoder)  # type: ignore[arg-type]

            patched.setattr(type(pool._decoders[0]), "receive", interrupted)
            with pytest.raises(KeyboardInterrupt):
                pool.map(BLOBS)
        assert_same(list(pool.map(BLOBS[10:])), BLOBS[10:])


def test_decoder_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ServerError, match="left with exit status 1"):
        DecodePool(PREPROCESS, processes=1)


def test_children_do_not_import_torch_and_leave_with_their_parent(root: Path) -> None:
    # The parent is killed without a chance to clean up.
    code = (
        "import os, sys\n"
        "from mambamic.decoding import DecodePool\n"
        "from mambamic.preprocess import Preprocess\n"
        "assert 'torch' not in sys.modules\n"
        "pool = DecodePool(Preprocess(32), processes=2)\n"
        "pids = [decoder.process.pid for decoder in pool._decoders]\n"
        "maps = [open(f'/proc/{pid}/maps').read() for pid in pids]\n"
        "print(*pids, any('libtorch' in text for text in maps), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60
    )
    *pids, torch_seen = result.stdout.split()
    assert torch_seen == "False"
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(Path("/proc", pid).exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path("/proc", pid).exists() for pid in pids)


def test_close_leaves_no_process() -> None:
    before = children()
    pool = DecodePool(PREPROCESS, processes=2)
    assert len(children()) == len(before) + 2
    pool.close()
    pool.close()
    assert children() == before


def test_real_tiles(data_dir: Path) -> None:
    with zipfile.ZipFile(data_dir / "pbc200/val.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".webp")][:40]
        blobs = [archive.read(name) for name in names]
    with DecodePool(PREPROCESS, processes=2) as pool:
        assert_same(list(pool.map(blobs)), blobs)


# Prints by how many bytes a pixel the process grows at most.
PEAK = """
import sys
from mambamic.images import decode

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

small, large = (open(path, "rb").read() for path in sys.argv[1:])
decode(small)
before = peak()
decode(large)
print((peak() - before) / 4000**2)
"""


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_a_large_image_is_held_twice_at_most(mode: str, tmp_path: Path) -> None:
    paths = [tmp_path / "small.png", tmp_path / "large.png"]
    for path, side in zip(paths, (10, 4000), strict=True):
        Image.new(mode, (side, side)).save(path, compress_level=1)
    command = [sys.executable, "-c", PEAK, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # Pillow takes four for each pixel, whatever the mode.
    assert float(done.stdout) < 10


def test_few_large_images_are_decoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PIXELS_AT_ONCE", 5000)  # two of BLOBS, and not three
    held: list[int] = []
    most = 0
    lock = threading.Lock()

    def slow(image: Image.Image) -> Image.Image:
        nonlocal most
        with lock:
            held.append(image.width * image.height)
            most = max(most, sum(held))
        time.sleep(0.02)
        with lock:
            held.pop()
        return to_rgb(image)

    monkeypatch.setattr(decoding, "to_pixels", slow)
    with DecodePool(PREPROCESS, threads=8) as pool:
        began = time.perf_counter()
        timed = pool.timed(BLOBS)
        assert most == 4000
        # Of eight threads two decode: the wait of the others is no decoding time.
        assert sum(one.decode_s for one in timed) < 3 * (time.perf_counter() - began)
        # An image beyond the limit goes alone.
        monkeypatch.setattr(decoding, "PIXELS_AT_ONCE", 1)
    with DecodePool(PREPROCESS, threads=8) as pool:
        most = 0
        assert_same(pool.map(BLOBS), BLOBS)
        assert most == 2000
