"""Starting, reloading and stopping nginx."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from mambamic.edge.settings import EdgeSettings, render
from mambamic.errors import ServerError
from mambamic.launcher.folders import state_root

# The variables that nginx.conf uses are there since.
MINIMUM = (1, 20)
START_TIMEOUT_S = 15
DRAIN_TIMEOUT_S = 150
HERE = Path(__file__).resolve().parent
CONF = "nginx.conf"


@dataclass(frozen=True)
class EdgeFolder:
    """The folder of the edge on one port: nginx's prefix, which holds all that it reads and writes.

    Args:
        root: With an absolute path.
    """

    root: Path

    @classmethod
    def of_port(cls, port: int) -> EdgeFolder:
        """Return the folder that belongs to a port."""
        return cls(state_root().absolute() / f"edge-{port}")

    @property
    def logs(self) -> Path:
        """Where access.log and error.log are."""
        return self.root / "logs"

    def command(self, nginx: Path, *arguments: str, conf: Path | None = None) -> list[str]:
        """Return the command line of nginx for this folder."""
        where = ["-p", f"{self.root}/", "-c", str(conf or self.root / CONF)]
        return [str(nginx), *where, "-e", str(self.logs / "error.log"), *arguments]

    def master(self) -> psutil.Process | None:
        """Return nginx's master process, or None where none runs."""
        try:
            pid = int((self.root / "nginx.pid").read_text(encoding="ascii"))
            process = psutil.Process(pid)
            ours = any(f"{self.root}/" in part for part in process.cmdline())
            return process if ours and process.status() != psutil.STATUS_ZOMBIE else None
        except (OSError, ValueError, psutil.Error):
            return None


def find_nginx() -> Path:
    """Return nginx's executable.

    Raises:
        ServerError: There is none, or it is too old.
    """
    # Debian has it where only root looks.
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    remedy = "on Debian, apt-get install nginx-light; else see nginx.org"
    expected = f"nginx {MINIMUM[0]}.{MINIMUM[1]} or newer"
    if found is None:
        raise ServerError("nginx is not installed", expected, remedy)
    said = subprocess.run([found, "-v"], capture_output=True, text=True, check=False).stderr
    version = re.search(r"nginx/(\d+)\.(\d+)", said)
    if version is None or (int(version[1]), int(version[2])) < MINIMUM:
        raise ServerError(f"{found} is {said.strip()[:80]!r}", expected, remedy)
    return Path(found)


def write(settings: EdgeSettings, folder: Path) -> None:
    """Write everything that nginx reads into a folder.

    Args:
        settings: What the edge is to do.
        folder: Becomes nginx's prefix; it need not exist.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in ("logs", "tmp"):
        (folder / name).mkdir(exist_ok=True)
    shutil.copytree(HERE / "page", folder / "page", dirs_exist_ok=True)
    _write_conf(settings, folder)


def _write_conf(settings: EdgeSettings, folder: Path) -> None:
    shutil.copyfile(HERE / CONF, folder / CONF)
    for name, content in render(settings).items():
        path = folder / name
        path.touch(mode=0o600)  # it may hold tokens
        path.write_text(content, encoding="utf-8")


def start(settings: EdgeSettings, say: Callable[[str], None]) -> bool:
    """Start the edge on a port, or let the one that runs there take new settings.

    No request is lost by that: new processes take what comes, the old ones answer what they have
    begun and then end, which is waited for. After that no server that has been left out is asked.

    Args:
        settings: What the edge is to do.
        say: Told what could not be waited for.

    Returns:
        Whether an edge was running.

    Raises:
        ServerError: nginx is missing or refuses the settings; an edge that runs keeps its own.
    """
    folder = EdgeFolder.of_port(settings.port)
    nginx = find_nginx()
    prepare(settings, folder, nginx)
    master = folder.master()
    if master is None:
        _run(folder.command(nginx, *as_this_user()))
        _wait_for(lambda: folder.master() is not None, folder)
        return False
    old = master.children()
    master.send_signal(signal.SIGHUP)
    _wait_for(lambda: set(master.children()) - set(old), folder)
    if _outlasting(old, settings.timeout + 30):
        say("requests that began before are still being answered by the servers of before")
    return True


def prepare(settings: EdgeSettings, folder: EdgeFolder, nginx: Path) -> None:
    """Write an edge's folder, after nginx has seen the settings and found them good.

    Raises:
        ServerError: nginx refuses them.
    """
    trial = folder.root / "trial"
    for path in (folder.root, trial, folder.logs, folder.root / "tmp"):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        _write_conf(settings, trial)
        _run(folder.command(nginx, *as_this_user(), "-t", conf=trial / CONF))
    finally:
        shutil.rmtree(trial)
    write(settings, folder.root)


def stop(port: int, say: Callable[[str], None], drain: float = DRAIN_TIMEOUT_S) -> bool:
    """Stop the edge on a port: requests that have begun are answered, others refused.

    Args:
        port: Where it answers.
        say: Told what could not be waited for.
        drain: Seconds that requests in flight have.

    Returns:
        Whether an edge was running.
    """
    master = EdgeFolder.of_port(port).master()
    if master is None:
        return False
    family = [master, *master.children()]
    master.send_signal(signal.SIGQUIT)
    if left := _outlasting(family, drain):
        say(f"requests still in flight after {drain:.0f} s are dropped")
        for number, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)
            left = _outlasting(left, seconds)
    return True


def as_this_user() -> list[str]:
    """Return options that keep nginx's processes from becoming another user's.

    All of them read and write a folder that only its owner may enter.
    """
    return ["-g", "user root;"] if os.geteuid() == 0 else []


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise ServerError(
            f"nginx refuses:\n{done.stderr.strip()[-2000:]}\n",
            "settings that it takes, and a port that is free",
            "mend what it names, or choose another --port",
        )


def _outlasting(processes: Sequence[psutil.Process], timeout: float) -> list[psutil.Process]:
    """Wait for processes to end, and return those that have not."""
    deadline = time.monotonic() + timeout
    while left := [process for process in processes if _runs(process)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return left


def _runs(process: psutil.Process) -> bool:
    try:
        # One that has ended may wait for long to be noticed by its parent.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _wait_for(condition: Callable[[], object], folder: EdgeFolder) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise ServerError(
                f"nginx has not taken the settings after {START_TIMEOUT_S} s",
                "new processes of it",
                f"see {folder.logs / 'error.log'}",
            )
        time.sleep(0.05)
