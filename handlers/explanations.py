"""Answers to requests for explanations: pictures, where a prediction would be numbers."""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Mapping
from typing import Any

from mambamic.classifier import Classifier
from mambamic.errors import MambamicError, UsageError
from mambamic.explain.explanation import Explanation, Question
from mambamic.explain.overlay import encode, overlay
from mambamic.handlers.requests import Tile, TileRequest, check_limits
from mambamic.handlers.responses import Answer, error_answer, failure, list_answer, overloaded
from mambamic.images import decode

logger = logging.getLogger(__name__)

# One image takes as long as some two hundred predictions, and the whole batch waits.
MAX_IMAGES = 8
# As PNG, and that in base64, the worst of images still fit the frontend's limit of 64 MiB.
MAX_PIXELS = 15_000_000


class Explainer:
    """Answer requests for explanations, one after the other.

    Args:
        classifier: What is explained.
        name: Of the model, for the answers.
        version: Likewise.
    """

    def __init__(self, classifier: Classifier, name: str, version: str) -> None:
        self._classifier = classifier
        self._model = {"model": name, "version": version}

    def answer(self, request: TileRequest, accept: str, last_begin: float) -> Answer:
        """Answer one request.

        Args:
            request: With the settings ``class``, ``method`` and ``stage``.
            accept: The header of that name: a single image is answered with a picture, unless
                this asks for JSON.
            last_begin: On the monotonic clock; an image whose turn comes later is refused.
        """
        try:
            question = _question(self._classifier, request.settings)
            check_limits(request.tiles, MAX_IMAGES, MAX_PIXELS, "to explain in one request")
            outcomes = [self._explain(question, tile, last_begin) for tile in request.tiles]
            if not request.single:
                return list_answer(
                    [tile.name for tile in request.tiles],
                    [self._as_json(outcome) for outcome in outcomes],
                )
            if isinstance(outcomes[0], MambamicError):
                return error_answer(outcomes[0])
            as_json = "application/json" in accept.lower()
            return Answer(self._as_json(outcomes[0]) if as_json else outcomes[0][1])
        except MambamicError as error:
            return error_answer(error)
        except Exception as error:
            # Without its message and its arguments, which may quote the request.
            logger.error("a request was not explained: %s", type(error).__name__)
            return error_answer(failure(error))

    def _explain(
        self, question: Question, tile: Tile, last_begin: float
    ) -> tuple[Explanation, bytes] | MambamicError:
        if isinstance(tile.content, MambamicError):
            return tile.content
        if time.monotonic() > last_begin:
            return overloaded()
        try:
            image = decode(tile.content)
            preprocess = self._classifier.preprocess
            explanation = question.explain(preprocess.pixels(image))
            return explanation, encode(overlay(image, explanation, preprocess))
        except MambamicError as error:
            # The frames of its traceback hold the image's bytes.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            return error
        except Exception as error:
            logger.exception("an explanation failed")
            return failure(error)

    def _as_json(
        self, outcome: tuple[Explanation, bytes] | MambamicError
    ) -> dict[str, Any] | MambamicError:
        if isinstance(outcome, MambamicError):
            return outcome
        explanation, picture = outcome
        encoded = base64.b64encode(picture).decode()
        return {**explanation.as_json(), **self._model, "overlay_png": encoded}


def _question(classifier: Classifier, settings: Mapping[str, str]) -> Question:
    stage = settings.get("stage")
    if stage is not None and not (stage.isascii() and stage.isdecimal()):
        raise UsageError(f"stage {stage[:80]!r}", "a whole number from 1 to 4", "leave it out")
    return Question(
        classifier,
        settings.get("method", "auto")[:80],
        settings["class"][:200] if "class" in settings else None,
        int(stage[:8]) if stage is not None else None,
    )
