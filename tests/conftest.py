"""Fixtures that several test modules share."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

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
# Files that share a server, or a wheel, run in one process, where it is made once.
SHARED = {
    f"tests/{name}.py": what
    for what, names in {
        "the demo's server": (
            *("e2e/test_server", "e2e/test_accuracy", "e2e/test_page", "e2e/test_slides"),
            *("e2e/test_security", "e2e/test_hostile_requests"),
        ),
        "a quick server": ("e2e/test_faults", "e2e/test_client", "e2e/test_explanations"),
        "a wheel": ("test_packaging", "test_without_torch"),
    }.items()
    for name in names
}
# Files that begin first, in this order. Two measure with the machine alone, which costs least while
# other tests are short; then the longest, or one process would end long after the others, those
# that wait for servers beside those that compute, so that no core idles.
FIRST = [
    f"tests/{name}.py"
    for name in (
        *("e2e/test_server", "e2e/test_edge_servers", "e2e/test_metrics", "test_training_stops"),
        *("e2e/test_load", "test_slides_score", "e2e/test_faults", "e2e/test_slides_ray"),
        *("e2e/test_lifecycle", "e2e/test_health", "test_training_ranks", "e2e/test_npz"),
        *("e2e/test_stopping", "test_dockerfile", "e2e/test_openapi", "test_packaging"),
        *("e2e/test_edge_limits", "test_explain_methods", "e2e/test_edge", "test_training_run"),
        *("e2e/test_plain_torchserve", "test_evaluation_run", "e2e/test_readme", "test_graph_cpu"),
        *("e2e/test_onnx", "test_export_onnx_export", "test_slides_big", "test_models"),
    )
]


# What tests import stays: looking through it for garbage, again and again, is a fifth of the time
# that collecting them takes.
gc.disable()


def pytest_collection_finish() -> None:
    """From here on there is garbage, and not among what was imported."""
    gc.freeze()
    gc.enable()


def pytest_configure() -> None:
    """Take Ctrl-C where a shell started this in the background: what is ignored is inherited."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class ByServer(LoadFileScheduling):  # type: ignore[misc]
    """Processes take a file at a time, or all files that share a server."""

    def _split_scope(self, nodeid: str) -> str:
        file = str(super()._split_scope(nodeid))
        return SHARED.get(file, file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByServer:
    """Have the files distributed."""
    return ByServer(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Let a test wait while one of another process has the machine alone."""
    with turn():
        return (yield)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and, outside CI, what needs absent data."""
    import torch

    order = {file: number for number, file in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))

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
