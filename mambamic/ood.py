"""Whether an image is of the kind that a model was made for: a detector on its embeddings.

The score is the Mahalanobis distance from the nearest class mean (Lee et al. 2018,
arXiv:1807.03888), in units of the distance below which 95 % of the validation images are. The
spread is that of probabilistic principal components (Tipping and Bishop 1999): the strongest
directions each have their variance, all others one. NumPy alone, and in a file beside the weights,
so that a checkpoint without one is what it always was.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from PIL import Image

from mambamic.checkpoint import OOD_FILE, Checkpoint, write_file
from mambamic.errors import CheckpointError, DataError

MINIMUM = 50  # images to fit a detector to
SHARE = 0.95  # of the validation images that count as known
_SHRINKAGE = 0.1  # towards a sphere: there are hardly more images than channels
_FOLDS = 5
# Beyond them a spread of a thousand images tells chance; and a server reads all of them for every
# image, which from memory takes as long as the rest of an answer.
_DIRECTIONS = 64
_SHAPES = {"means": 2, "directions": 2, "rest": 1, "threshold": 1}
_WEIGHTS = "weights_sha256"
_AGAIN = "fit the detector anew by: mambamic ood CHECKPOINT DATA"

Embeddings = NDArray[np.floating]


@dataclass(frozen=True)
class Detector:
    """A score of how far an embedding is from those of the images that the model knows.

    Args:
        means: (classes, C) float32, of the embeddings of each class that has images.
        directions: (C, D) float32, those of the strongest spread within the classes, orthogonal;
            each as long as the root of what its variance takes off the inverse of ``rest``.
        rest: The variance in any other direction.
        threshold: The distance below which ``SHARE`` of the validation images are.
    """

    means: NDArray[np.float32]
    directions: NDArray[np.float32]
    rest: float
    threshold: float

    def scores(self, embeddings: Embeddings) -> NDArray[np.float64]:
        """Return distances in units of the threshold: above 1 an image counts as unknown.

        Args:
            embeddings: (B, C).

        Returns:
            (B,), infinite for embeddings that are no numbers.
        """
        distances = self.distances(embeddings) / self.threshold
        return np.where(np.isfinite(distances), distances, np.inf)

    def distances(self, embeddings: Embeddings) -> NDArray[np.float64]:
        """Return the Mahalanobis distance from the nearest mean, (B,), of embeddings (B, C)."""
        # In float32, as a server does this for every image. Differences are projected, and not
        # embeddings and means, whose projections are long and nearly the same.
        apart = embeddings.astype(np.float32, copy=False)[:, np.newaxis] - self.means
        along = apart @ self.directions
        squares = np.einsum("bkc,bkc->bk", apart, apart) / self.rest
        squares -= np.einsum("bkd,bkd->bk", along, along)
        nearest: NDArray[np.float64] = np.sqrt(squares.min(axis=1).clip(0).astype(np.float64))
        return nearest

    def to_bytes(self, weights_sha256: str) -> bytes:
        """Return the file of a detector, bound to the weights that it was fitted to."""
        tensors: dict[str, NDArray[np.floating]] = {
            # safetensors writes what lies in memory, in whichever order that is.
            "means": np.ascontiguousarray(self.means),
            "directions": np.ascontiguousarray(self.directions),
            "rest": np.array([self.rest], np.float64),
            "threshold": np.array([self.threshold], np.float64),
        }
        data: bytes = safetensors.numpy.save(tensors, metadata={_WEIGHTS: weights_sha256})
        return data


def fit_detector(embeddings: Embeddings, labels: NDArray[np.int64]) -> Detector:
    """Fit a detector to validation images.

    The threshold is of images that the means and the spread were not computed from: of each fold
    by the others.

    Args:
        embeddings: (N, C).
        labels: (N,), or (N, classes) of 0 and 1, of which each combination is a class.

    Raises:
        DataError: There are fewer than ``MINIMUM`` images.
    """
    if len(embeddings) < MINIMUM:
        raise DataError(
            f"{len(embeddings)} images to fit a detector to",
            f"at least {MINIMUM}",
            "hold back more images",
        )
    groups = np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
    folds = np.arange(len(embeddings)) % _FOLDS
    apart = np.empty(len(embeddings))
    for fold in range(_FOLDS):
        kept = folds != fold
        apart[~kept] = _fit(embeddings[kept], groups[kept]).distances(embeddings[~kept])
    return replace(_fit(embeddings, groups), threshold=float(np.quantile(apart, SHARE)))


def store_detector(checkpoint: Checkpoint, detector: Detector) -> Path:
    """Write a detector beside the weights of a checkpoint, whole or not at all.

    Returns:
        The file.

    Raises:
        CheckpointError: The folder cannot be written to.
    """
    return write_file(checkpoint, OOD_FILE, detector.to_bytes(checkpoint.config.weights_sha256))


def load_detector(checkpoint: Checkpoint) -> Detector | None:
    """Read the detector of a checkpoint, or None where none was fitted.

    Raises:
        CheckpointError: The file is damaged, or of other weights.
    """
    path = checkpoint.path / OOD_FILE
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            stated = (file.metadata() or {}).get(_WEIGHTS)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})", "a detector", _AGAIN) from error
    if stated != checkpoint.config.weights_sha256:
        raise CheckpointError(
            f"{path} was fitted to weights of SHA-256 {stated}",
            checkpoint.config.weights_sha256,
            f"delete the file, or {_AGAIN}",
        )
    _check(path, tensors)
    rest, threshold = (float(tensors[name][0]) for name in ("rest", "threshold"))
    return Detector(tensors["means"], tensors["directions"], rest, threshold)


def auroc(known: NDArray[np.float64], unknown: NDArray[np.float64]) -> float:
    """Return how often an unknown image has the higher score of a pair; ties count half.

    Args:
        known: Scores of images that the model knows.
        unknown: Scores of others.
    """
    order = np.sort(known)
    below = np.searchsorted(order, unknown, "left")
    not_above = np.searchsorted(order, unknown, "right")
    return float((below + not_above).mean() / 2 / len(known))


def made_outliers(pixels: NDArray[np.uint8]) -> dict[str, NDArray[np.uint8]]:
    """Make images of kinds that a model does not know out of such that it knows.

    Args:
        pixels: (N, S, S, 3).

    Returns:
        By kind, (N, S, S, 3) each: ``blank`` (the brightest tenth's colour of each, with a little
        noise), ``half scale`` (with mirrored surroundings) and ``double scale``.
    """
    size = pixels.shape[1]
    random = np.random.default_rng(0)
    blank, half, double = (np.empty_like(pixels) for _ in range(3))
    quarter = size // 4
    for place, tile in enumerate(pixels):
        colour = np.percentile(tile.reshape(-1, 3), 90, axis=0)
        noise = random.normal(0, random.uniform(0, 4), tile.shape)
        blank[place] = np.clip(colour + noise, 0, 255).astype(np.uint8)
        image = Image.fromarray(tile)
        small = np.asarray(image.resize((size // 2, size // 2), Image.Resampling.BICUBIC))
        after = size - size // 2 - quarter
        half[place] = np.pad(small, ((quarter, after), (quarter, after), (0, 0)), "reflect")
        box = (size / 4, size / 4, size * 3 / 4, size * 3 / 4)
        double[place] = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return {"blank": blank, "half scale": half, "double scale": double}


def _fit(embeddings: Embeddings, groups: NDArray[np.intp]) -> Detector:
    """Fit all but the threshold."""
    exact = embeddings.astype(np.float64)
    means = np.stack([exact[groups == group].mean(0) for group in np.unique(groups)])
    centred = exact - means[np.searchsorted(np.unique(groups), groups)]
    spread = centred.T @ centred / len(exact)
    variance = np.trace(spread) / len(spread)
    spread = (1 - _SHRINKAGE) * spread + (_SHRINKAGE * variance + 1e-12) * np.eye(len(spread))
    variances, directions = np.linalg.eigh(spread)  # the weakest first
    weak = max(1, len(spread) - _DIRECTIONS)
    rest = variances[:weak].mean()
    lengths = np.sqrt((1 / rest - 1 / variances[weak:]).clip(0))
    strong = directions[:, weak:] * lengths
    return Detector(means.astype(np.float32), strong.astype(np.float32), float(rest), 1.0)


def _check(path: Path, tensors: dict[str, NDArray[np.floating]]) -> None:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    fits = {name: len(shape) for name, shape in shapes.items()} == _SHAPES and (
        shapes["rest"] == shapes["threshold"] == (1,)
        and shapes["directions"][0] == shapes["means"][1]
    )
    finite = all(np.isfinite(tensor).all() for tensor in tensors.values())
    if not fits or not finite or min(tensors["rest"], tensors["threshold"]) <= 0:
        raise CheckpointError(
            f"{path} holds {shapes}",
            "finite means (classes, C), directions (C, D), and a rest and a threshold above 0",
            _AGAIN,
        )
