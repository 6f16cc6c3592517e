"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from .random_checkpoint import write_random_checkpoint
from .turns import turn

ROOT = Path(__file__).resolve().parent.parent


def _find_data() -> Path | None:
    named = os.environ.get("MAMBAMIC_DATA")
    if named:
        return Path(named)
    beside = ROOT.parent / "shared" / "data"
    return beside if beside.is_dir() else None


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real images and slides; tests that need it are left out where it is absent."""
    found = _find_data()
    if found is None or not found.is_dir():
        pytest.fail(f"real data not found ({found}): set MAMBAMIC_DATA to its folder")
    return found


@pytest.fixture(scope="session", autouse=True)
def _no_exporter() -> Iterator[None]:
    """Handlers that run inside a test export nothing, unless the test says so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
        patch.setenv("MAMBAMIC_METRICS_PORT", "0")
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


LEFT_OUT = pytest.StashKey[int]()
# Files of more than a minute, which begin after those with servers: were they the last, one process
# would end long after the others.
LONGEST = ("test_slides_score.py", "test_training_stops.py", "test_training_ranks.py")


def pytest_configure() -> None:
    """Take Ctrl-C where a shell started this in the background: what is ignored is inherited."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Let a test wait while one of another process has the machine alone."""
    with turn():
        return (yield)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and, outside CI, what needs absent data."""
    import torch

    items.sort(key=lambda item: (item.path.parent.name != "e2e", item.path.name not in LONGEST))

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
    found = _find_data()
    if (found is not None and found.is_dir()) or os.environ.get("CI"):
        return
    without = [item for item in items if "data_dir" in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=without)
    items[:] = [item for item in items if item not in without]
    config.stash[LEFT_OUT] = len(without)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say in one line what absent data left out."""
    count = config.stash.get(LEFT_OUT, 0)
    if count:
        terminalreporter.write_line(
            f"{count} tests need real data: set MAMBAMIC_DATA to its folder", yellow=True
        )


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of MambaMIC-T for eight classes with random weights, the same each time."""
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "random")


@pytest.fixture(scope="session")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tracked folders: a build leaves files behind."""
    copy = tmp_path_factory.mktemp("source")
    names = [
        "mambamic",
        "kernels",
        "handlers",
        "export",
        "deploy",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    ]
    subprocess.run(["cp", "-a", *(str(root / name) for name in names), str(copy)], check=True)
    (copy / "kernels" / "_scan2d.so").unlink(missing_ok=True)
    target = tmp_path_factory.mktemp("wheel")
    command = ["pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(target)]
    subprocess.run([sys.executable, "-m", *command, str(copy)], check=True, capture_output=True)
    (built,) = target.iterdir()
    return built
