"""Whether an answer is right in kind: predictions for good images, words for everything else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from loadtest.images import Sent

# Too much at once is told so; it is no fault of the server's, nor of the image.
BUSY = 429


def fault(sent: Sequence[Sent], status: int, headers: Mapping[str, str], body: bytes) -> str | None:
    """Return what is wrong with an answer, or None.

    Args:
        sent: The images of the request: one, or several in a ZIP.
        status: Of the answer; 0 where there was none.
        headers: Of the answer.
        body: Of the answer.
    """
    if status == 0:
        return "no answer"
    try:
        answer = json.loads(body)
    except ValueError:
        return f"{status} whose body is not JSON"
    if status == BUSY:
        stated = {name.lower(): value for name, value in headers.items()}.get("retry-after", "")
        return None if stated.isdigit() and _is_error(answer) else "429 without words or time"
    if any(one.good for one in sent):
        if status != 200:
            return f"{status} to a good image"
    elif not 400 <= status < 500:
        return f"{status} to bad input"
    if len(sent) == 1:
        return _fault_of_one(sent[0], answer)
    if not isinstance(answer, list) or len(answer) != len(sent):
        return f"{status} without an entry for each image"
    faults = (_fault_of_one(one, entry) for one, entry in zip(sent, answer, strict=True))
    return next(filter(None, faults), None)


def _fault_of_one(sent: Sent, answer: Any) -> str | None:
    if not sent.good:
        return None if _is_error(answer) else "bad input without an error"
    if not isinstance(answer, dict) or "probabilities" not in answer:
        return "a good image without a prediction"
    values = answer["probabilities"]
    named = answer.get("label") in values and max(values.values()) == values[answer["label"]]
    right = named and all(math.isfinite(value) and 0 <= value <= 1 for value in values.values())
    return None if right else "a prediction that contradicts itself"


def _is_error(answer: Any) -> bool:
    error = answer.get("error") if isinstance(answer, dict) else None
    return isinstance(error, dict) and bool(error.get("code")) and bool(error.get("message"))
