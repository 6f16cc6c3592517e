"""The TorchServe handler: requests in, answers out, and never an exception for bad input.

An archive's handler file defines one class of its own over `ImageClassifier`. Its
``model-config.yaml`` has a section ``mambamic`` with the version that wrote it and, optionally,
``device``, ``backend``, ``dtype`` and ``decoders``, the number of processes that decode images
beside the model (0: in threads of the worker, which is enough for a CPU).
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from mambamic._version import __version__
from mambamic.decoding import DecodePool
from mambamic.errors import (
    CheckpointError,
    InferenceError,
    MambamicError,
    RequestError,
    UnavailableError,
    UsageError,
)
from mambamic.handlers.gate import Gate
from mambamic.handlers.parts import keep_parts
from mambamic.handlers.requests import TileRequest, read_request
from mambamic.handlers.responses import Answer, error_answer, list_answer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mambamic.classifier import Classifier
    from mambamic.preprocess import Pixels

    Probabilities = NDArray[np.float32]

logger = logging.getLogger(__name__)

# The tiles of a batch are decoded and classified in parts of this many, the next part being
# decoded while the one before is classified: 32 requests may carry 8192 tiles.
PART_SIZE = 64


class ImageClassifier:
    """Answer batches of requests with the predictions of one checkpoint."""

    def initialize(self, context: Any) -> None:
        """Load the checkpoint of an unpacked archive and warm it up.

        Args:
            context: TorchServe's, with ``model_dir``, ``gpu_id`` and the model's configuration.

        Raises:
            CheckpointError: The archive was written by an incompatible version, or is damaged.
        """
        from mambamic.classifier import Classifier

        options = _options(context.model_yaml_config)
        keep_parts()
        properties = context.system_properties
        self._classifier: Classifier = Classifier.load(
            properties["model_dir"],
            device=_device(options["device"], properties.get("gpu_id")),
            backend=options["backend"],
            dtype=options["dtype"],
        )
        self._name = str(context.model_name)
        self._version = str(context.manifest["model"].get("modelVersion", ""))
        self._gate = Gate.from_environment()
        self._pool = DecodePool(self._classifier.preprocess, processes=options["decoders"])
        self._ahead = ThreadPoolExecutor(1, "decode-ahead")
        self._classifier.warm_up()
        logger.info("%s", json.dumps(self._classifier.describe()))

    def handle(self, data: Sequence[object], context: Any) -> list[bytes]:
        """Answer a batch.

        Args:
            data: One entry per request; only their number is used, see `keep_parts`.
            context: TorchServe's, with a processor per request.

        Returns:
            One JSON text per request; the status is set on the context, per request.
        """
        processors = context.request_processor
        assert len(processors) == len(data)
        with self._gate.busy() if self._gate is not None else nullcontext():
            answers = self._answer(processors)
        bodies = []
        for index, answer in enumerate(answers):
            context.set_response_content_type(index, "application/json")
            if answer.status != 200:
                context.set_response_status(answer.status, answer.phrase, index)
            bodies.append(json.dumps(answer.body, ensure_ascii=False).encode())
        return bodies

    def close(self) -> None:
        """Stop what decodes; TorchServe never calls this, it ends the process."""
        self._ahead.shutdown()
        self._pool.close()

    def _answer(self, processors: Sequence[Any]) -> list[Answer]:
        stopping = self._gate is not None and self._gate.closed
        read = [self._read(processor, stopping) for processor in processors]
        # All tiles of all requests go through the model together.
        blobs = [
            tile.content
            for request in read
            if isinstance(request, TileRequest)
            for tile in request.tiles
            if isinstance(tile.content, bytes)
        ]
        results = iter(self._classify(blobs))
        answers = []
        for request in read:
            if isinstance(request, Answer):
                answers.append(request)
                continue
            outcomes = [
                self._prediction(next(results)) if isinstance(tile.content, bytes) else tile.content
                for tile in request.tiles
            ]
            if request.single:
                (outcome,) = outcomes
                answers.append(
                    error_answer(outcome) if isinstance(outcome, MambamicError) else Answer(outcome)
                )
            else:
                answers.append(list_answer([tile.name for tile in request.tiles], outcomes))
        return answers

    def _read(self, processor: Any, stopping: bool) -> TileRequest | Answer:
        try:
            if stopping:
                raise UnavailableError(
                    "the server is stopping", "a running server", "send the request again later"
                )
            if processor.headers.get("describe") == "True":
                return Answer(self._describe())
            if processor.headers.get("explain") == "True":
                raise RequestError(
                    "an explanation was asked for",
                    "a prediction; this archive offers no explanations",
                    f"send the request to /predictions/{self._name}",
                )
            return read_request(processor.parts, processor.headers.get("content-type", ""))
        except MambamicError as error:
            return error_answer(error)
        except Exception as error:
            # Its message may quote the request, which has no place in a log.
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("a request could not be read: %s\n%s", type(error).__name__, frames)
            return error_answer(_failure(error))

    def _describe(self) -> dict[str, Any]:
        return {"model": self._name, "version": self._version, **self._classifier.describe()}

    def _prediction(self, outcome: Probabilities | MambamicError) -> dict[str, Any] | MambamicError:
        if isinstance(outcome, MambamicError):
            return outcome
        (prediction,) = self._classifier.predictions(outcome[np.newaxis])
        return {**prediction.as_json(), "model": self._name, "version": self._version}

    def _classify(self, blobs: Sequence[bytes]) -> list[Probabilities | MambamicError]:
        parts = [blobs[start : start + PART_SIZE] for start in range(0, len(blobs), PART_SIZE)]
        results: list[Probabilities | MambamicError] = []
        coming = self._ahead.submit(self._decode, parts[0]) if len(parts) > 1 else None
        for number, part in enumerate(parts):
            decoded = self._decode(part) if coming is None else coming.result()
            if number + 1 < len(parts):
                coming = self._ahead.submit(self._decode, parts[number + 1])
            results += self._classify_part(decoded)
        return results

    def _decode(self, blobs: Sequence[bytes]) -> list[Pixels | MambamicError]:
        try:
            return self._pool.map(blobs)
        except Exception as error:
            logger.exception("decoding failed")
            return [_failure(error)] * len(blobs)

    def _classify_part(
        self, decoded: Sequence[Pixels | MambamicError]
    ) -> list[Probabilities | MambamicError]:
        good = [pixels for pixels in decoded if not isinstance(pixels, MambamicError)]
        results = iter(self._probabilities(np.stack(good)) if good else ())
        return [item if isinstance(item, MambamicError) else next(results) for item in decoded]

    def _probabilities(self, pixels: Pixels) -> list[Probabilities | MambamicError]:
        """Classify; after a failure, such as memory that ran out, each half once more."""
        whole = self._attempt(pixels)
        if whole is not None:
            return whole
        _release_memory()
        results: list[Probabilities | MambamicError] = []
        for half in np.array_split(pixels, min(2, len(pixels))):
            again = self._attempt(half)
            failure = InferenceError(
                "the model failed on this image, or on one beside it",
                "a prediction",
                "send it again; if it fails once more, see the server's log",
            )
            results += [failure] * len(half) if again is None else again
        return results

    def _attempt(self, pixels: Pixels) -> list[Probabilities | MambamicError] | None:
        try:
            rows = self._classifier.probabilities(pixels)
        except Exception:
            logger.exception("the model failed on a batch of %d", len(pixels))
            return None
        return [row if np.isfinite(row).all() else _not_finite() for row in rows]


def _options(config: dict[str, Any] | None) -> dict[str, Any]:
    """Return the ``mambamic`` section of an archive's configuration, checked, with defaults."""
    section = (config or {}).get("mambamic")
    if not isinstance(section, dict) or "version" not in section:
        raise CheckpointError(
            f"the archive's model-config.yaml has mambamic: {section!r}",
            "a section with the version that wrote the archive",
            "write the archive anew by: mambamic archive CHECKPOINT",
        )
    _check_version(str(section["version"]))
    options = {"device": "auto", "backend": "auto", "dtype": "auto", "decoders": 0, **section}
    decoders = options["decoders"]
    if type(decoders) is not int or not 0 <= decoders <= 256:
        raise UsageError(
            f"decoders: {decoders!r} in model-config.yaml",
            "a whole number from 0 to 256",
            "set how many processes decode images; 0 decodes in threads",
        )
    return options


def _check_version(version: str) -> None:
    """Refuse an archive of another major version or, before 1.0, of another minor one."""
    ours, theirs = __version__.split("."), version.split(".")
    significant = 2 if ours[0] == "0" else 1
    if ours[:significant] != theirs[:significant]:
        raise CheckpointError(
            f"the archive was written by mambamic {version}",
            f"mambamic {'.'.join(ours[:significant])}.x, as {__version__} is installed here",
            f"install mambamic {version}, or write the archive anew by: mambamic archive",
        )


def _device(asked: str, gpu_id: int | None) -> str:
    """Return the device of this worker: TorchServe deals out the GPUs by number."""
    if asked == "auto":
        return "cpu" if gpu_id is None else f"cuda:{gpu_id}"
    return f"cuda:{gpu_id}" if asked == "cuda" and gpu_id is not None else asked


def _release_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _failure(error: Exception) -> InferenceError:
    return InferenceError(
        f"the server failed on this request ({type(error).__name__})",
        "an answer",
        "send it again; if it fails once more, see the server's log",
    )


def _not_finite() -> InferenceError:
    return InferenceError(
        "the model's probabilities for this image are not finite",
        "numbers from 0 to 1",
        "serve the model with dtype float32, or see whether its weights are damaged",
    )
