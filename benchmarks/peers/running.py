"""Starting this server and others with the same model, each from an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import urllib3

from mambamic.launcher.probe import draw_cell

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# What their own requirements leave open is resolved by pip on the day of the run, and recorded.
PEERS = {
    "litserve": ("litserve==0.2.19", "python-multipart==0.0.34"),
    "bentoml": ("bentoml==1.4.39",),
}


@dataclass
class Running:
    """A server under test.

    Args:
        name: Of the server.
        url: Where images are sent.
        process: What a person would send SIGTERM to.
        port: Where it listens.
        state: The state folder of ours.
    """

    name: str
    url: str
    process: psutil.Process
    port: int
    state: Path | None = None

    def workers(self) -> list[psutil.Process]:
        """Return the processes that hold the model: among all those with torch, the leaves."""
        found = [one for one in self.family() if _has_torch(one)]
        parents = {one.ppid() for one in found}
        return [one for one in found if one.pid not in parents] or found

    def cpu_seconds(self) -> float:
        """Return what its living processes have computed so far."""
        total = 0.0
        for one in self.family():
            with suppress(psutil.Error):
                times = one.cpu_times()
                total += times.user + times.system
        return total

    def family(self) -> list[psutil.Process]:
        """Return the server's processes that live."""
        with suppress(psutil.Error):
            return [self.process, *self.process.children(recursive=True)]
        return []


def _has_torch(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return any("libtorch_cpu" in one.path for one in process.memory_maps())
    return False


def prepare(name: str, folder: Path) -> Path:
    """Return an interpreter that has a peer, and everything that this one has.

    Args:
        name: Of the peer.
        folder: Where environments are kept; one that is there is used.
    """
    home = folder / name
    python = home / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEERS[name]], check=True)
    # After its own packages, those of this environment: torch, and mambamic itself.
    own = sysconfig.get_path("purelib")
    packages = next((home / "lib").glob("python3*")) / "site-packages"
    (packages / "zz_mambamic.pth").write_text(f"import site; site.addsitedir({own!r})\n")
    return python


def versions(python: Path) -> dict[str, str]:
    """Return what a peer's environment has installed."""
    listed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format=freeze", "--local"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    wanted = ("litserve", "bentoml", "fastapi", "starlette", "uvicorn")
    pairs = (line.partition("==")[::2] for line in listed.splitlines())
    return {name: version for name, version in pairs if name in wanted}


@contextmanager
def peer(name: str, python: Path, checkpoint: Path, port: int) -> Iterator[Running]:
    """Run a peer, and leave nothing of it behind."""
    commands = {
        "litserve": [str(python), str(HERE / "litserve_app.py")],
        "bentoml": [
            str(python), "-m", "bentoml", "serve", "bentoml_app:Cells",
            "--working-dir", str(HERE), "--host", "127.0.0.1", "--port", str(port),
        ],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        variables = {
            **os.environ,
            "CHECKPOINT": str(checkpoint.resolve()),
            "PORT": str(port),
            "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
            "BENTOML_HOME": scratch,
            "BENTOML_DO_NOT_TRACK": "True",
            "PYTHONPATH": str(ROOT),
        }
        with Path(scratch, "console").open("wb") as console:
            child = subprocess.Popen(
                commands[name], cwd=scratch, env=variables, stdout=console, stderr=console,
                start_new_session=True,
            )  # fmt: skip
        running = Running(name, f"http://127.0.0.1:{port}/predict", psutil.Process(child.pid), port)
        try:
            yield running
        finally:
            end(running)
            child.wait()


@contextmanager
def ours(checkpoint: Path, port: int, state: Path, *options: str) -> Iterator[Running]:
    """Run this server as its documents say, in the foreground so that SIGTERM stops it."""
    call = [sys.executable, "-m", "mambamic", "serve", "--model", str(checkpoint)]
    child = subprocess.Popen(
        [*call, "--device", "cpu", "--port", str(port), "--foreground", *options],
        env={**os.environ, "MAMBAMIC_STATE": str(state)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}/predictions/mambamic"
    running = Running("mambamic", url, psutil.Process(child.pid), port, state)
    try:
        if not wait_until_it_predicts(running, draw_cell()):
            raise SystemExit(f"this server does not predict on port {port}")
        yield running
    finally:
        end(running)
        child.wait()


def end(running: Running) -> None:
    """Stop a server, gently at first."""
    family = running.family()
    with suppress(psutil.Error):
        running.process.terminate()
    _, left = psutil.wait_procs(family, timeout=10)
    for process in left:
        with suppress(psutil.Error):
            process.kill()


def post(url: str, image: bytes, timeout: float = 60) -> int:
    """Send a JPEG file in a form, once; return the status, or 0 where there was no answer."""
    fields = {"image": ("image.jpg", image, "image/jpeg")}
    try:
        return urllib3.request("POST", url, fields=fields, retries=False, timeout=timeout).status
    except urllib3.exceptions.HTTPError:
        return 0


def wait_until_it_predicts(running: Running, image: bytes, seconds: float = 120) -> bool:
    """Wait for a prediction, and tell whether one came."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if post(running.url, image, timeout=20) == 200:
            return True
        time.sleep(0.1)
    return False
