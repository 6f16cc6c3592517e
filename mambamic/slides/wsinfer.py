"""Models of the WSInfer model zoo: a folder with ``config.json`` and a TorchScript file.

The file format is described at https://github.com/SBU-BMI/wsinfer-zoo. It does not say what the
outputs are; WSInfer takes the softmax of several and the sigmoid of one. Here the head is stated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mambamic.errors import BackendError, CheckpointError, UsageError
from mambamic.preprocess import Pixels, Preprocess
from mambamic.slides.scorers import Scored
from mambamic.slides.settings import ModelFacts

CONFIG, WEIGHTS = "config.json", "torchscript_model.pt"
HEADS = ("softmax", "sigmoid")
_BATCH = {"cpu": 32, "cuda": 128}


def is_wsinfer(folder: Path) -> bool:
    """Tell whether a folder is of the model zoo."""
    return (folder / WEIGHTS).is_file()


def wsinfer_facts(folder: Path, head: str | None) -> ModelFacts:
    """Read what a run has to know of a model; its code is not run.

    Args:
        folder: With ``config.json`` and ``torchscript_model.pt``.
        head: What makes probabilities of its outputs: ``softmax`` or ``sigmoid``.

    Raises:
        CheckpointError: The config is wrong.
        UsageError: The head is not stated, or makes no sense.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        classes = tuple(str(name) for name in config["class_names"])
        tile, mpp = int(config["patch_size_pixels"]), float(config["spacing_um_px"])
        preprocess = _preprocess(config["transform"], tile)
        outputs = int(config["num_classes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / CONFIG} ({error!r})", "a config of the WSInfer model zoo", "get it again"
        ) from error
    if outputs != len(classes):
        raise CheckpointError(
            f"{len(classes)} class names for {outputs} outputs", "one for each", "correct it"
        )
    if head not in HEADS or (head == "softmax" and outputs == 1):
        raise UsageError(
            f"--head {head} for a model of {outputs} outputs"
            if head
            else f"no --head for the model {folder.name}, whose config does not say what its "
            f"{outputs} outputs are",
            "softmax (one class is right) or sigmoid (each on its own; the only one for 1 output)",
            "see the model's card, and give --head",
        )
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes() + (folder / CONFIG).read_bytes())
    return ModelFacts(
        kind="wsinfer",
        name=str(config.get("name") or folder.resolve().name),
        identity=f"{digest.hexdigest()} {head}",
        classes=classes,
        head=head,
        tile=tile,
        mpp=mpp,
        preprocess=preprocess,
    )


def _preprocess(transform: Sequence[Any], tile: int) -> Preprocess:
    """Read the list of steps; any other than these would change the scores."""
    size, mean, std = tile, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    for step in transform:
        name, given = step["name"], step.get("arguments") or {}
        if name == "Resize":
            side = given["size"]
            size = int(side[0] if isinstance(side, list) else side)
            if isinstance(side, list) and len(set(side)) != 1:
                raise ValueError(f"Resize to {side}, which is not square")
        elif name == "Normalize":
            red, green, blue = map(float, given["mean"])
            mean = (red, green, blue)
            red, green, blue = map(float, given["std"])
            std = (red, green, blue)
        elif name != "ToTensor":
            raise ValueError(f"a step {name!r} that is not known")
    return Preprocess(size, "stretch", "bilinear", mean, std)


class WsinferScorer:
    """A TorchScript model on this machine.

    Args:
        folder: Of the model.
        facts: Of the model.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        trust: Whether the user has agreed to run its code.

    Raises:
        UsageError: The user has not.
        BackendError: There is no such device here.
        CheckpointError: The file cannot be loaded.
    """

    threads = 1
    encoded = False

    def __init__(self, folder: Path, facts: ModelFacts, device: str, *, trust: bool) -> None:
        import torch

        from mambamic.engine import find_device

        if not trust:
            raise UsageError(
                f"{folder / WEIGHTS}, which is TorchScript: a program that runs with your rights",
                "a model from someone you trust",
                "check where it comes from (its SHA-256 is "
                f"{facts.identity.split()[0][:16]}... with its config), then add --trust",
            )
        self.facts = facts
        self._device = find_device(device)
        try:
            module = torch.jit.load(str(folder / WEIGHTS), map_location=self._device)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{folder / WEIGHTS} ({str(error).splitlines()[0]})", "TorchScript", "get it again"
            ) from error
        self._module = module.eval()
        self.batch = _BATCH[self._device.type]

    def score(self, tiles: Pixels | Sequence[bytes]) -> Scored:
        """Score pixels."""
        import torch

        assert isinstance(tiles, np.ndarray)
        batch = torch.from_numpy(self.facts.preprocess.normalise(tiles)).to(self._device)
        with torch.inference_mode():
            logits = self._module(batch).float()
        if logits.shape != (len(tiles), len(self.facts.classes)):
            raise BackendError(
                f"outputs of shape {tuple(logits.shape)} for {len(tiles)} tiles",
                f"({len(tiles)}, {len(self.facts.classes)}), as the model's config states",
                "correct num_classes and class_names",
            )
        chances = logits.softmax(1) if self.facts.head == "softmax" else logits.sigmoid()
        return Scored(chances.cpu().numpy(), None)

    def describe(self) -> dict[str, Any]:
        """Return what is in use."""
        import torch

        versions = {"torch": torch.__version__}
        return {"device": str(self._device), "graph": "TorchScript", "versions": versions}

    def close(self) -> None:
        """Do nothing: the model goes with the process."""
