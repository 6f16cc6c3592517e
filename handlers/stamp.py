"""How long a request has been under way: from the time that a proxy in front stamped on it.

A worker cannot see how long a request waited in TorchServe's queue. Proxies state when it reached
them in the header ``X-Request-Start``, by convention as ``t=`` and a Unix time: nginx in seconds
with milliseconds, others in whole milliseconds or microseconds.
"""

from __future__ import annotations

import re

HEADER = "x-request-start"  # as `keep_parts` names it, in lower case
# What is longer is counted as this much, so that one odd stamp does not spoil a mean.
LONGEST_S = 600.0
# A stamp so far from this machine's clock, in either direction, says nothing.
_CREDIBLE_S = 3600.0

_STAMP = re.compile(r"\s*(?:t=)?(\d{9,20}(?:\.\d{1,9})?)\s*(?:,|$)", re.ASCII)
# In seconds no time before the year 5138 is as large, in milliseconds none since 1973 as small.
_SECONDS_BELOW = 1e11


def seconds_since(stamp: str | None, now: float) -> float | None:
    """Return how long ago a request was stamped, or None where nobody can tell.

    Args:
        stamp: The header's value, in seconds, milliseconds, microseconds or nanoseconds since
            1970, with or without ``t=``; of several, separated by commas, the first counts.
        now: Seconds since 1970.

    Returns:
        Seconds, from 0 (clocks differ a little) to ``LONGEST_S``.
    """
    match = _STAMP.match(stamp or "")
    if match is None:
        return None
    moment = float(match[1])
    while moment >= _SECONDS_BELOW:
        moment /= 1000
    age = now - moment
    if abs(age) > _CREDIBLE_S:
        return None
    return min(max(age, 0.0), LONGEST_S)
