"""Every part of a request, as the frontend sent it.

TorchServe's worker turns the parts of a request into a dictionary by name, so of two fields
with one name the second silently replaces the first. The parts are therefore kept beside the
dictionary, and what was sent can be compared with what arrived.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mambamic.errors import ServerError


class Part(NamedTuple):
    """One part of a request: a form field, or the whole body under the name ``body``."""

    name: str
    content_type: str
    value: object


def keep_parts() -> None:
    """Let the worker keep the parts and headers of each request; calling it twice is harmless.

    Afterwards each request processor of a batch has ``parts``, a list of `Part` in request
    order, and ``headers``, a dictionary with names in lower case.

    Raises:
        ServerError: this TorchServe reads requests in another way.
    """
    from ts.service import Service

    original = getattr(Service, "retrieve_data_for_inference", None)
    if original is None:
        from ts.version import __version__ as found

        raise ServerError(
            f"TorchServe {found} has no Service.retrieve_data_for_inference",
            "TorchServe 0.12.0",
            "run pip install 'mambamic[serve]' in the server's environment",
        )
    if getattr(original, "keeps_parts", False):
        return

    def retrieve(batch: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any], dict[int, str]]:
        processors, inputs, ids = original(batch)
        for processor, request in zip(processors, batch, strict=True):
            processor.parts = [
                Part(part["name"], part["contentType"] or "", part["value"])
                for part in request["parameters"]
            ]
            processor.headers = {
                header["name"].decode("utf-8", "replace").lower(): header["value"].decode(
                    "utf-8", "replace"
                )
                for header in request["headers"] or ()
            }
        return processors, inputs, ids

    retrieve.keeps_parts = True  # type: ignore[attr-defined]
    Service.retrieve_data_for_inference = staticmethod(retrieve)
