"""Heat maps of the evidence for a class, by three methods.

A heat map is (S, S) float32, S the model's input size: what speaks for the class at each place, in
a unit that depends on the method and never below 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mambamic.classifier import Classifier
from mambamic.graph.plain import forward
from mambamic.preprocess import Pixels

Heat = NDArray[np.float32]
_GRID = 14  # windows per side that are covered one after the other
_WINDOW = 3  # the side of a window, in steps of that grid
_STEPS = 8  # images on the way from plain background to the image
_BATCH = 4  # of these at a time
_SMOOTHING = 1 / 28  # radius of the blur over gradients, in sides of the image


def log_odds(probabilities: NDArray[np.float32], target: int, head: str) -> NDArray[np.float64]:
    """Return log(p / (1 - p)) of a class, which does not saturate as p does.

    Args:
        probabilities: (B, classes).
        target: The class.
        head: ``softmax`` or ``sigmoid``.
    """
    exact = probabilities.astype(np.float64)
    least = np.finfo(np.float32).tiny
    own = exact[:, target]
    others = 1 - own if head == "sigmoid" else np.delete(exact, target, axis=1).sum(1)
    odds: NDArray[np.float64] = np.log(np.maximum(own, least)) - np.log(np.maximum(others, least))
    return odds


def occlusion(classifier: Classifier, pixels: Pixels, target: int) -> Heat:
    """Cover one window after the other, and see how much the log-odds of the class fall.

    Zeiler and Fergus 2014, arXiv:1311.2901. It asks the network alone, whatever its layers do with
    places, at 197 predictions an image.

    Args:
        classifier: Any.
        pixels: (S, S, 3) uint8.
        target: The class.
    """
    size = len(pixels)
    count = min(_GRID, size)
    edges = np.linspace(0, size, count + 1)
    reach = (_WINDOW - 1) / 2 * size / count
    starts = np.maximum(np.rint(edges[:-1] - reach), 0).astype(int)
    ends = np.minimum(np.rint(edges[1:] + reach), size).astype(int)
    covered = np.repeat(pixels[np.newaxis], count * count + 1, axis=0)
    for row in range(count):
        for column in range(count):
            place = slice(starts[row], ends[row]), slice(starts[column], ends[column])
            covered[row * count + column][place] = background(pixels)
    odds = log_odds(classifier.probabilities(covered), target, classifier.config.head)
    falls = (odds[-1] - odds[:-1]).reshape(count, count)
    return _enlarged(falls, size)


def integrated_gradients(classifier: Classifier, pixels: Pixels, target: int) -> Heat:
    """Sum the gradient of the log-odds over images between plain background and this one.

    Sundararajan et al. 2017, arXiv:1703.01365. Gradients are of the input, so that it does not
    matter where a feature map keeps what it saw.

    Args:
        classifier: Any; its plain module is run, in float32.
        pixels: (S, S, 3) uint8.
        target: The class.
    """
    return np.maximum(_blurred(attributions(classifier, pixels, target)), 0)


def attributions(classifier: Classifier, pixels: Pixels, target: int) -> NDArray[np.float32]:
    """Share the log-odds that the image has over plain background among its pixels.

    Args:
        classifier: Any; its plain module is run, in float32.
        pixels: (S, S, 3) uint8.
        target: The class.

    Returns:
        (S, S), of both signs.
    """
    model = classifier.plain_module()
    plain = np.broadcast_to(background(pixels), pixels.shape)
    ends = torch.from_numpy(classifier.preprocess.normalise(np.stack([plain, pixels])))
    with torch.inference_mode(False), torch.enable_grad():
        start, end = ends.to(classifier.device)
        total = torch.zeros_like(start)
        for steps in torch.arange(0.5, _STEPS).split(_BATCH):
            along = (steps / _STEPS).to(start).view(-1, 1, 1, 1)
            x = (start + along * (end - start)).requires_grad_()
            score = _log_odds_of(model(x), target, classifier.config.head).sum()
            total += torch.autograd.grad(score, x)[0].sum(0)
    shares: NDArray[np.float32] = (total * (end - start) / _STEPS).sum(0).cpu().numpy()
    return shares


def grad_cam(classifier: Classifier, pixels: Pixels, target: int, stage: int = 4) -> Heat:
    """Weight the channels of a stage's feature map by their mean gradient.

    Selvaraju et al. 2017, arXiv:1610.02391. For MedMamba: MambaMIC's maps mix each place with its
    mirror image across the diagonal.

    Args:
        classifier: Any; its plain module is run, in float32.
        pixels: (S, S, 3) uint8.
        target: The class.
        stage: Of the network, from 1 to 4.
    """
    x = torch.from_numpy(classifier.preprocess.normalise(pixels[np.newaxis]))
    with torch.inference_mode(False), torch.enable_grad():
        x = x.to(classifier.device).requires_grad_()
        run = forward(classifier.plain_module(), x, stage)
        score = _log_odds_of(run.logits, target, classifier.config.head).sum()
        (gradient,) = torch.autograd.grad(score, run.feature_map)
    weights = gradient.mean(dim=(1, 2), keepdim=True)
    evidence = (weights * run.feature_map.detach()).sum(-1)[0]
    return _enlarged(evidence.cpu().numpy(), len(pixels))


def background(pixels: Pixels) -> NDArray[np.uint8]:
    """Return the median colour of an image's edge, (3,) uint8."""
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colour: NDArray[np.uint8] = np.median(edge, axis=0).astype(np.uint8)
    return colour


def _log_odds_of(logits: Tensor, target: int, head: str) -> Tensor:
    own = logits[:, target]
    if head == "sigmoid" or logits.shape[1] == 1:
        return own
    others = torch.cat([logits[:, :target], logits[:, target + 1 :]], dim=1)
    return own - others.logsumexp(1)


def _enlarged(evidence: NDArray[np.floating[Any]], size: int) -> Heat:
    image = Image.fromarray(evidence.astype(np.float32))
    enlarged: Heat = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    return np.maximum(enlarged, 0)


def _blurred(evidence: NDArray[np.float32]) -> Heat:
    # Pillow's Gaussian blur takes bytes alone.
    sigma = len(evidence) * _SMOOTHING
    reach = np.arange(-round(3 * sigma), round(3 * sigma) + 1)
    kernel = np.exp(-0.5 * (reach / max(sigma, 1e-3)) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        evidence = np.apply_along_axis(_convolved, axis, evidence, kernel)
    return evidence.astype(np.float32)


def _convolved(line: NDArray[np.float32], kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    # numpy's own "same" is as long as the longer of the two.
    reach = len(kernel) // 2
    return np.convolve(line, kernel)[reach : reach + len(line)]
