"""The client with a real server, and with the edge in front of it."""

from __future__ import annotations

import io
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mambamic import Client, Prediction
from mambamic.bundles import Limits
from mambamic.cli import main
from mambamic.client import Patience
from mambamic.errors import DecodeError, UnauthorizedError

from .edges import RunningEdge, edge
from .servers import RunningServer, run_mambamic, wait_for

TOKEN = "a-token-of-the-laboratory"


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    """Noise of sizes of its own: no two are predicted alike."""
    draw = np.random.default_rng(7)
    files = []
    for number in range(40):
        pixels = draw.integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        files.append(buffer.getvalue())
    return files


@pytest.fixture(scope="module")
def strict(quick: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEdge]:
    """An edge that wants a token, takes little at a time and no large bodies."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text(TOKEN + "\n")
    options = ["--tokens", str(tokens), "--max-body", "1", "--in-flight", "1"]
    with edge(tokens.parent, *options, ports=[quick.port]) as running:
        yield running


def url(running: RunningServer) -> str:
    return f"http://127.0.0.1:{running.port}"


def test_the_command_prints_what_the_local_one_does(
    quick: RunningServer,
    quick_checkpoint: Path,
    images: list[bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = []
    for number, content in enumerate([*images[:5], b"no image"]):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(content)
    files = [*map(str, paths), str(tmp_path / "nothing.png")]
    for option in ([], ["--json"], ["--embedding"]):
        there = run_mambamic(quick.state, "predict", "--server", url(quick), *option, *files)
        # In this process, which has torch at hand.
        local = main(["predict", str(quick_checkpoint), "--device", "cpu", *option, *files])
        here = capsys.readouterr()
        assert there.returncode == local == 1
        # Embeddings depend a little on what else is in a batch, in their last digits.
        if option != ["--embedding"]:
            assert there.stdout == here.out
        assert len(there.stdout.splitlines()) == len(here.out.splitlines()) >= 5
        assert there.stderr == here.err


def test_embeddings_arrive(quick: RunningServer, images: list[bytes]) -> None:
    with Client(url(quick)) as client:
        outcomes = client.predict(images[:3], embedding=True)
    for outcome in outcomes:
        assert isinstance(outcome, Prediction)
        assert outcome.embedding is not None
        assert len(outcome.embedding) == 768


def same(one: object, other: object) -> bool:
    """Tell whether two predictions are of the same image, within what its neighbours change."""
    assert isinstance(one, Prediction)
    assert isinstance(other, Prediction)
    values, others = (list(each.probabilities.values()) for each in (one, other))
    return np.allclose(values, others, atol=1e-5)


def test_a_crowd_gets_through_a_narrow_edge(
    strict: RunningEdge, quick: RunningServer, images: list[bytes]
) -> None:
    """429, and 413 for what is too large at once, cost time and no prediction."""
    with Client(url(quick)) as client:
        expected = client.predict(images)

    def ask(number: int, tiles: int) -> bool:
        limits = Limits(tiles=tiles)
        with Client(url(strict), token=TOKEN, limits=limits, connections=3) as client:
            found = client.predict((images * 4)[:number])
        return all(map(same, found, expected * 4))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, (8, 40, 80, 160), (1, 8, 16, 256)))
    log = strict.access_log
    assert '"status":429' in log
    assert '"status":413' in log


def test_without_the_token_it_says_so(strict: RunningEdge, images: list[bytes]) -> None:
    with Client(url(strict)) as client, pytest.raises(UnauthorizedError, match="ask whoever runs"):
        client.predict(images)


def test_a_zip_of_images_is_no_image(quick: RunningServer, images: list[bytes]) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", images[0])
    with Client(url(quick)) as client:
        (outcome,) = client.predict([buffer.getvalue()])
    assert isinstance(outcome, DecodeError)


def test_the_server_is_restarted_meanwhile(
    quick: RunningServer, quick_checkpoint: Path, state: Path, images: list[bytes]
) -> None:
    outcomes: list[object] = []
    with edge(state, ports=[quick.port]) as front:

        def ask() -> None:
            with Client(
                url(front), limits=Limits(tiles=2), connections=1, patience=Patience(overall=120)
            ) as client:
                outcomes.extend(client.stream([*images, b"bad"] * 10))

        thread = threading.Thread(target=ask)
        thread.start()
        assert wait_for(lambda: len(outcomes) > 40, 60)
        again = ("serve", "--port", str(quick.port))
        run_mambamic(quick.state, *again, "--stop")
        time.sleep(1)
        done = run_mambamic(
            quick.state, *again, "--model", str(quick_checkpoint), "--device", "cpu"
        )
        assert done.returncode == 0, done.stderr
        thread.join(120)
        assert not thread.is_alive()
    bad = [number for number, one in enumerate(outcomes) if isinstance(one, DecodeError)]
    assert bad == list(range(40, 410, 41))
    assert all(isinstance(one, Prediction | DecodeError) for one in outcomes)
    assert len(outcomes) == 410
