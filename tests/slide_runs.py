"""Calls of ``mambamic score``, and what they leave."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mambamic.cli import main

ROOT = Path(__file__).resolve().parent.parent


def command(*arguments: object) -> list[str]:
    """What a user types, for a process of its own."""
    return [sys.executable, "-m", "mambamic", "score", *map(str, arguments)]


def score(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Call the command in this process, which has torch at hand: in another it takes seconds."""
    call = ["score", *map(str, arguments)]
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()) as complaints:
        try:
            status = main(call)
        except SystemExit as left:
            status = int(left.code or 0)
    return subprocess.CompletedProcess(call, status, said.getvalue(), complaints.getvalue())


def score_apart(
    *arguments: object, before: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Call the command as users do; ``before`` are words that come before it."""
    return subprocess.run(
        [*before, *command(*arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        check=False,
    )


def table(folder: Path) -> pa.Table:
    return pq.read_table(folder / "tiles.parquet")


def only(out: Path, stem: str = "") -> Path:
    (folder,) = [path for path in out.glob(f"{stem}*") if path.is_dir()]
    return folder


def summary(folder: Path) -> Any:
    return json.loads((folder / "summary.json").read_text())
