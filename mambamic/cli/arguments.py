"""Types of arguments that several commands share."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """Read a whole number of at least 1; for ``type=`` of an argument."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number of at least 1")
    return value
