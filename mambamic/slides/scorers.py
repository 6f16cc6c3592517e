"""What gives scores to tiles: a model on this machine, a server, or someone else's TorchScript."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mambamic.preprocess import Pixels
from mambamic.slides.settings import ModelFacts

Scores = NDArray[np.float32]


@dataclass(frozen=True)
class Scored:
    """Scores of a batch.

    Args:
        probabilities: (B, classes).
        embeddings: (B, C), None where there are none.
        refused: Why tiles were refused, by their place; their scores are to be passed over.
    """

    probabilities: Scores
    embeddings: Scores | None
    refused: dict[int, str] = field(default_factory=dict)


class Scorer(Protocol):
    """A model that is ready.

    Args:
        facts: What a run has to know of it.
        batch: Tiles that it takes at a time.
        threads: Batches that it is to be given at a time.
        encoded: Whether it takes PNG files.
    """

    facts: ModelFacts
    batch: int
    threads: int
    encoded: bool

    def score(self, tiles: Pixels | Sequence[bytes]) -> Scored:
        """Score tiles: (B, S, S, 3) uint8, or PNG files where it asks for these."""

    def describe(self) -> dict[str, Any]:
        """Return what is in use, as JSON."""

    def close(self) -> None:
        """Let go of it, also while another thread scores; calling it twice does no harm."""


def checkpoint_facts(folder: Path) -> ModelFacts:
    """Read what a run has to know of a checkpoint, or of an ONNX file that was made from one.

    Raises:
        CheckpointError: It is damaged.
    """
    from mambamic.checkpoint import load_checkpoint
    from mambamic.graph.onnx import find_onnx, open_onnx

    file = find_onnx(folder, asked=False)
    config = load_checkpoint(folder).config if file is None else open_onnx(file).checkpoint.config
    # Metrics and licence may be added to a checkpoint without changing a score.
    decides = ("architecture", "classes", "input_size", "resize", "interpolation", "mean", "std")
    stated = {name: getattr(config, name) for name in (*decides, "head", "temperature")}
    text = json.dumps({**stated, "weights": config.weights_sha256}, sort_keys=True)
    return ModelFacts(
        kind="checkpoint",
        name=folder.resolve().name,
        identity=hashlib.sha256(text.encode()).hexdigest(),
        classes=config.classes,
        head=config.head,
        tile=config.input_size,
        mpp=config.mpp,
        preprocess=config.preprocess,
    )


class CheckpointScorer:
    """A checkpoint on this machine."""

    threads = 1
    encoded = False

    def __init__(self, folder: Path, device: str, dtype: str, *, embeddings: bool) -> None:
        from mambamic.classifier import Classifier

        self.facts = checkpoint_facts(folder)
        self._classifier = Classifier.load(folder, device, dtype=dtype)
        self._classifier.warm_up()
        self._embeddings = embeddings
        self.batch = self._classifier.max_batch

    def score(self, tiles: Pixels | Sequence[bytes]) -> Scored:
        """Score pixels."""
        assert isinstance(tiles, np.ndarray)
        probabilities, embeddings = self._classifier.outputs(tiles)
        return Scored(probabilities, embeddings if self._embeddings else None)

    def describe(self) -> dict[str, Any]:
        """Return device, type, kernels and versions."""
        return self._classifier.describe()

    def close(self) -> None:
        """Do nothing: the model goes with the process."""
