"""How commands import what is large."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """Import without looking for garbage: of a million objects that stay there is none.

    Python looks whenever so many more were made, and again at all that is there: a sixth of the
    time that Lightning takes.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
