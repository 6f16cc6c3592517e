"""Files that are there whole or not at all, also on a folder that several machines share."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What a slide's folder of results holds: the first from the start, the second once it is planned.
LOCKS, JOB = ".locks", "job.json"
_MARK = ".tmp-"


@contextlib.contextmanager
def fresh(path: Path) -> Iterator[Path]:
    """Give a path to write to, which takes the place of ``path`` when the block ends well."""
    # Beginning with a point: those who read the folder as a table pass over it.
    name = f"{_MARK}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}-{path.name}"
    temporary = path.with_name(name)
    try:
        yield temporary
        # A machine that loses its power must not leave an empty file under the final name.
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write a JSON document, whole or not at all."""
    with fresh(path) as temporary:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON document, None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def is_results(folder: Path) -> bool:
    """Tell whether a folder is one of a slide's results, whose pictures are none to be scored."""
    return (folder / JOB).is_file() or (folder / LOCKS).is_dir()


def sweep(folder: Path) -> None:
    """Remove what killed processes of this machine left half-written."""
    mine = f"{_MARK}{socket.gethostname()}-"
    for path in folder.rglob(f"{mine}*"):
        pid = path.name.removeprefix(mine).partition("-")[0]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)
