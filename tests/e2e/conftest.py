"""A checkpoint and one server that the tests of a session share."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from mambamic import Classifier
from mambamic.launcher.probe import draw_cell

from ..random_checkpoint import write_random_checkpoint
from .edges import Front, edge, scripted
from .servers import ROOT, RunningServer, serve


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The demo checkpoint."""
    return ROOT / "model_store" / "mambamic_t_pbc"


@pytest.fixture(scope="session")
def quick_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with small inputs, where the test is of the server and not of the model."""
    return write_random_checkpoint(tmp_path_factory.mktemp("quick") / "random", input_size=64)


@pytest.fixture(scope="session")
def classifier(checkpoint: Path) -> Classifier:
    """The library's own view of the checkpoint that is served."""
    return Classifier.load(checkpoint, device="cpu")


@pytest.fixture
def state() -> Iterator[Path]:
    """A state folder for the servers of one test."""
    with tempfile.TemporaryDirectory(prefix="mambamic-test-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def server(checkpoint: Path) -> Iterator[RunningServer]:
    """A server that many tests share, and none may harm."""
    with (
        tempfile.TemporaryDirectory(prefix="mambamic-test-") as folder,
        serve(Path(folder), str(checkpoint), "--device", "cpu") as running,
    ):
        yield running


@pytest.fixture(scope="session")
def quick(quick_checkpoint: Path) -> Iterator[RunningServer]:
    """A server with a model of small inputs, of which tests may kill the workers."""
    with (
        tempfile.TemporaryDirectory(prefix="mambamic-test-") as folder,
        serve(Path(folder), str(quick_checkpoint), "--device", "cpu") as running,
    ):
        yield running


@pytest.fixture(scope="session")
def cell() -> bytes:
    """A drawn cell, PNG."""
    return draw_cell()


@pytest.fixture(scope="session")
def cell_image(cell: bytes) -> Image.Image:
    """The same, decoded."""
    return Image.open(io.BytesIO(cell))


@pytest.fixture(scope="module")
def shared_front() -> Iterator[Front]:
    """An edge in front of two servers."""
    with (
        tempfile.TemporaryDirectory(prefix="mambamic-test-") as folder,
        scripted() as one,
        scripted() as two,
        edge(Path(folder), "--timeout", "1", ports=[one.port, two.port]) as running,
    ):
        yield running, one, two


@pytest.fixture
def front(shared_front: Front) -> Front:
    """The same, with servers that answer and have forgotten what they were asked."""
    for server in shared_front[1:]:
        server.answer = 200
        server.seen.clear()
    return shared_front
