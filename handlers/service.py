"""The TorchServe handler: requests in, answers out, and never an exception for bad input.

An archive's handler file defines one class of its own over `ImageClassifier`. Its
``model-config.yaml`` has a section ``mambamic`` with the version that wrote it and, optionally,
``device``, ``backend``, ``dtype`` and ``decoders``, the number of processes that decode images
beside the model (0: in threads of the worker, which is enough for a CPU).
"""

from __future__ import annotations

import gc
import json
import logging
import re
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mambamic._version import __version__
from mambamic.decoding import DecodePool
from mambamic.errors import (
    CheckpointError,
    InferenceError,
    MambamicError,
    UnavailableError,
    UsageError,
)
from mambamic.graph.onnx import find_onnx
from mambamic.handlers import gpu
from mambamic.handlers.gate import Gate
from mambamic.handlers.keeper import keep_connection
from mambamic.handlers.metrics import ServiceMetrics
from mambamic.handlers.parts import keep_parts
from mambamic.handlers.requests import (
    EXPLAIN_SETTINGS,
    PREDICT_SETTINGS,
    Tile,
    TileRequest,
    read_request,
    size_of,
)
from mambamic.handlers.responses import Answer, error_answer, failure, list_answer, overloaded
from mambamic.launcher.probe import MARK, draw_cell

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mambamic.classifier import Classifier
    from mambamic.prediction import Prediction
    from mambamic.preprocess import Pixels

    Row = tuple[Prediction, NDArray[np.float32]]  # without its embedding, and that

logger = logging.getLogger(__name__)

# Tiles are decoded and classified in parts of this many, the next part being decoded while the one
# before is classified.
PART_SIZE = 64
# Requests of a batch are read, and their ZIPs expanded, until they have so many bytes or a part's
# worth of tiles; these are answered before more is read, as 32 ZIPs may expand to 16 GiB.
GROUP_BYTES = 64 * 2**20
# What TorchServe allows a batch, in seconds, where an archive does not say.
DEFAULT_RESPONSE_TIMEOUT = 120
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


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
        from mambamic.handlers.explanations import Explainer

        options = _options(context.model_yaml_config)
        keep_parts()
        properties = context.system_properties
        folder = Path(properties["model_dir"])
        # ONNX Runtime computes on the CPU, whichever GPU the frontend deals out.
        onnx = find_onnx(folder, asked=options["backend"] == "onnxruntime") is not None
        self._classifier: Classifier = Classifier.load(
            folder,
            device="cpu" if onnx else _device(options["device"], properties.get("gpu_id")),
            backend=options["backend"],
            dtype=options["dtype"],
        )
        self._name = str(context.model_name)
        self._version = str(context.manifest["model"].get("modelVersion", ""))
        # A request may have 256 tiles. Of a batch of several such only those are begun that leave
        # time to end: TorchServe kills a worker that is late, and the whole batch fails with it.
        timeout = context.model_yaml_config.get("responseTimeout", DEFAULT_RESPONSE_TIMEOUT)
        self._patience = float(timeout) / 2
        self._explainer = Explainer(self._classifier, self._name, self._version)
        self._gate = Gate.from_environment()
        self._keeper = keep_connection()
        self._pool = DecodePool(self._classifier.preprocess, processes=options["decoders"])
        self._ahead = ThreadPoolExecutor(1, "decode-ahead")
        gc.collect()
        gc.freeze()  # else each capture of a CUDA graph looks through all that is imported: 0.1 s
        self._classifier.warm_up()
        self._metrics = ServiceMetrics(self._name, self._version, self._classifier)
        self._probe = draw_cell()
        logger.info("%s", json.dumps(self._classifier.describe()))
        if self._gate is not None:
            self._gate.register()

    def handle(self, data: Sequence[object], context: Any) -> list[bytes]:
        """Answer a batch.

        Args:
            data: One entry per request; only their number is used, see `keep_parts`.
            context: TorchServe's, with a processor per request.

        Returns:
            One JSON text, or picture, per request; its type and the status are set on the context,
            per request.
        """
        processors = context.request_processor
        assert len(processors) == len(data)
        batch = self._metrics.begin(processors)
        with self._gate.busy() if self._gate is not None else nullcontext(False) as stopping:
            answers = self._answer(processors, stopping)
        bodies = []
        for index, answer in enumerate(answers):
            context.set_response_content_type(index, answer.content_type)
            if answer.status != 200:
                context.set_response_status(answer.status, answer.phrase, index)
            bodies.append(answer.encoded())
        self._metrics.end(batch, answers)
        _log_ids(processors, answers)
        if any(answer.status == InferenceError.status for answer in answers) and gpu.is_broken():
            gpu.leave()
        return bodies

    def close(self) -> None:
        """Stop what decodes; TorchServe never calls this, it ends the process."""
        self._ahead.shutdown()
        self._pool.close()
        self._metrics.close()
        if self._keeper is not None:
            self._keeper.communicate()
        if self._gate is not None:
            self._gate.unregister()

    def _answer(self, processors: Sequence[Any], stopping: bool) -> list[Answer]:
        last_begin = time.monotonic() + self._patience
        answers: dict[int, Answer] = {}
        group: dict[int, TileRequest] = {}
        # The lightest first: so most of them are answered, and single images together.
        order = sorted(range(len(processors)), key=lambda index: _weight(processors[index]))
        for index in (index for index in order if not _explains(processors[index])):
            in_time = time.monotonic() <= last_begin
            read = self._read(processors[index], stopping) if in_time else _overloaded()
            if isinstance(read, Answer):
                answers[index] = read
            else:
                group[index] = read
            # What it holds has to be gone before more is read.
            del read
            if _is_full(group.values()):
                answers |= self._answer_group(group)
                group.clear()
        answers |= self._answer_group(group)
        for index in (index for index in order if _explains(processors[index])):
            read = self._read(processors[index], stopping)
            accept = processors[index].headers.get("accept", "")
            answers[index] = (
                read
                if isinstance(read, Answer)
                else self._explainer.answer(read, accept, last_begin)
            )
            del read
        return [answers[index] for index in range(len(processors))]

    def _answer_group(self, group: Mapping[int, TileRequest]) -> dict[int, Answer]:
        """Answer requests whose tiles go through the model together."""
        blobs = [
            tile.content
            for request in group.values()
            for tile in request.tiles
            if isinstance(tile.content, bytes)
        ]
        results = iter(self._classify(blobs))
        answers = {}
        for index, request in group.items():
            embed = request.switch("embedding")
            outcomes = [
                self._prediction(next(results), embed=embed, counts=request.counts)
                if isinstance(tile.content, bytes)
                else tile.content
                for tile in request.tiles
            ]
            if not request.single:
                answers[index] = list_answer([tile.name for tile in request.tiles], outcomes)
            elif isinstance(outcomes[0], MambamicError):
                answers[index] = error_answer(outcomes[0])
            else:
                answers[index] = Answer(outcomes[0])
        return answers

    def _read(self, processor: Any, stopping: bool) -> TileRequest | Answer:
        try:
            if stopping:
                raise UnavailableError(
                    "the server is stopping", "a running server", "send the request again later"
                )
            headers = processor.headers
            # The management API asks so, and a client may, too; but what comes in by the port of
            # predictions the frontend marks with "explain", true or false.
            if headers.get("describe") == "True" and "explain" not in headers:
                return Answer(self._describe())
            if MARK in headers:
                return TileRequest((Tile("probe", self._probe),), True, counts=False)
            known = EXPLAIN_SETTINGS if _explains(processor) else PREDICT_SETTINGS
            request = read_request(processor.parts, headers.get("content-type", ""), known)
            request.switch("embedding")  # refused here, if at all
            self._metrics.read(len(request.tiles))
            return request
        except MambamicError as error:
            return error_answer(error)
        except Exception as error:
            # Its message may quote the request, which has no place in a log.
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("a request could not be read: %s\n%s", type(error).__name__, frames)
            return error_answer(failure(error))

    def _describe(self) -> dict[str, Any]:
        return {"model": self._name, "version": self._version, **self._classifier.describe()}

    def _prediction(
        self, outcome: Row | MambamicError, *, embed: bool, counts: bool
    ) -> dict[str, Any] | MambamicError:
        if isinstance(outcome, MambamicError):
            return outcome
        prediction, embedding = outcome
        if embed:
            prediction = replace(prediction, embedding=tuple(embedding.tolist()))
        if counts:
            self._metrics.predicted(prediction)
        return {**prediction.as_json(), "model": self._name, "version": self._version}

    def _classify(self, blobs: Sequence[bytes]) -> list[Row | MambamicError]:
        parts = [blobs[start : start + PART_SIZE] for start in range(0, len(blobs), PART_SIZE)]
        results: list[Row | MambamicError] = []
        coming = self._ahead.submit(self._decode, parts[0]) if len(parts) > 1 else None
        for number, part in enumerate(parts):
            decoded = self._decode(part) if coming is None else coming.result()
            if number + 1 < len(parts):
                coming = self._ahead.submit(self._decode, parts[number + 1])
            results += self._classify_part(decoded)
        return results

    def _decode(self, blobs: Sequence[bytes]) -> list[Pixels | MambamicError]:
        try:
            timed = self._pool.timed(blobs)
        except Exception as error:
            logger.exception("decoding failed")
            return [failure(error)] * len(blobs)
        self._metrics.decoded(timed)
        decoded = [item.result for item in timed]
        for item in decoded:
            if isinstance(item, MambamicError):
                # The frames of its traceback hold the image's bytes.
                item.__traceback__ = item.__cause__ = item.__context__ = None
        return decoded

    def _classify_part(
        self, decoded: Sequence[Pixels | MambamicError]
    ) -> list[Row | MambamicError]:
        good = [pixels for pixels in decoded if not isinstance(pixels, MambamicError)]
        results = iter(self._probabilities(np.stack(good)) if good else ())
        return [item if isinstance(item, MambamicError) else next(results) for item in decoded]

    def _probabilities(self, pixels: Pixels) -> list[Row | MambamicError]:
        """Classify; after a failure, such as memory that ran out, each half once more."""
        whole = self._attempt(pixels)
        if whole is not None:
            return whole
        gpu.release_memory()
        results: list[Row | MambamicError] = []
        for half in np.array_split(pixels, min(2, len(pixels))):
            again = self._attempt(half)
            failure = InferenceError(
                "the model failed on this image, or on one beside it",
                "a prediction",
                "send it again; if it fails once more, see the server's log",
            )
            results += [failure] * len(half) if again is None else again
        return results

    def _attempt(self, pixels: Pixels) -> list[Row | MambamicError] | None:
        began = time.monotonic()
        try:
            probabilities, embeddings = self._classifier.outputs(pixels)
        except Exception:
            logger.exception("the model failed on a batch of %d", len(pixels))
            return None
        self._metrics.modelled(len(pixels), time.monotonic() - began)
        # Of all at once: one by one a detector takes as long as a small model.
        predictions = self._classifier.predictions(probabilities, embeddings)
        rows = zip(predictions, embeddings, np.isfinite(probabilities), strict=True)
        return [(one, seen) if finite.all() else _not_finite() for one, seen, finite in rows]


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
        import torch

        # The frontend counts GPUs by itself: a torch that was built for CPUs, or finds no driver,
        # has none of them.
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return "cpu" if gpu_id is None or not count else f"cuda:{gpu_id % count}"
    return f"cuda:{gpu_id}" if asked == "cuda" and gpu_id is not None else asked


def _log_ids(processors: Sequence[Any], answers: Sequence[Answer]) -> None:
    """Log how the requests ended that the edge has given an id."""
    stated = [processor.headers.get("x-request-id", "") for processor in processors]
    told = [
        f"{name}={answer.status}"
        for name, answer in zip(stated, answers, strict=True)
        if _REQUEST_ID.fullmatch(name)
    ]
    if told:
        logger.info("answered %s", " ".join(told))


def _weight(processor: Any) -> int:
    """Return the bytes that a request carries."""
    return sum(size_of(part) for part in processor.parts)


def _is_full(group: Iterable[TileRequest]) -> bool:
    contents = [tile.content for request in group for tile in request.tiles]
    size = sum(len(content) for content in contents if isinstance(content, bytes))
    return len(contents) >= PART_SIZE or size >= GROUP_BYTES


def _explains(processor: Any) -> bool:
    """Tell whether a request came by the way of explanations: the frontend states it."""
    return bool(processor.headers.get("explain") == "True")


def _overloaded() -> Answer:
    return error_answer(overloaded())


def _not_finite() -> InferenceError:
    return InferenceError(
        "the model's probabilities for this image are not finite",
        "numbers from 0 to 1",
        "serve the model with dtype float32, or see whether its weights are damaged",
    )
