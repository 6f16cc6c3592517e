"""What several commands ask of their arguments."""

from __future__ import annotations

import argparse
from pathlib import Path

from mambamic.errors import UsageError


def positive(text: str) -> int:
    """Read a whole number of at least 1; for ``type=`` of an argument."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number of at least 1")
    return value


def check_target(out: Path, *, force: bool) -> None:
    """Refuse a file that cannot be written, before the work of making it.

    Args:
        out: Where it is to be.
        force: Whether one that is there may be replaced.

    Raises:
        UsageError: A file is there, or a folder, or there is no folder that could hold it.
    """
    if out.is_dir():
        raise UsageError(f"{out} is a folder", "a file to write", f"give {out / 'NAME'}, say")
    if out.exists() and not force:
        raise UsageError(f"{out} exists", "a new file", "give --force, or another path")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UsageError(f"{above} is a file", f"a folder for {out}", "give another path")
