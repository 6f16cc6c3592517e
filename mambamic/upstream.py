"""Files of the published research code: its ``.pth`` weights and ``class_indices.json``."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mambamic.errors import CheckpointError

# Under which training scripts store the weights beside an optimiser's state and the like.
_WRAPPERS = ("model", "state_dict", "model_state_dict")
_DATA_PARALLEL = "module."


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a ``.pth`` file without running anything that it holds.

    Args:
        path: A plain state dict, or one under ``model``, ``state_dict`` or ``model_state_dict``;
            the prefix ``module.`` of data-parallel training is removed.

    Returns:
        CPU tensors by the published code's keys.

    Raises:
        CheckpointError: The file cannot be read, holds more than tensors and plain values, or
            holds no state dict.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error), "check the path") from error
    # torch's own words here tell how to load the file in spite of it, and are not passed on.
    except pickle.UnpicklingError as error:
        reason = "it is not a torch file, or holds more than tensors: code that would be run"
        raise _unreadable(path, reason, "save model.state_dict() alone, and import that") from error
    # A damaged archive is reported as RuntimeError, EOFError, KeyError or ValueError.
    except (RuntimeError, EOFError, LookupError, ValueError) as error:
        reason = f"damaged, or not a torch file: {type(error).__name__}"
        raise _unreadable(path, reason, "get the file again") from error
    stated = _unwrapped(content)
    weights = {
        str(key).removeprefix(_DATA_PARALLEL): value
        for key, value in stated.items()
        if isinstance(value, Tensor)
    }
    if not weights or len(weights) < len(stated):
        held = ", ".join(map(str, list(stated)[:5])) or type(content).__name__
        raise _unreadable(path, f"no state dict in it, but {held}", "save model.state_dict()")
    return weights


def read_class_indices(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read class names in order from ``{"0": "basophil", "1": ...}``.

    Raises:
        CheckpointError: The file is missing, not such an object, or skips a number.
    """
    try:
        indices = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise _bad_classes(path, error.strerror or str(error)) from error
    except ValueError as error:
        raise _bad_classes(path, f"not JSON: {error}") from error
    if not isinstance(indices, dict) or not indices:
        raise _bad_classes(path, f"it holds {indices!r}")
    names = []
    for index in range(len(indices)):
        name = indices.get(str(index))
        if not isinstance(name, str):
            raise _bad_classes(path, f"entry {index} is {name!r}")
        names.append(name)
    return tuple(names)


def _unwrapped(content: object) -> Mapping[str, object]:
    if not isinstance(content, Mapping):
        return {}
    for wrapper in _WRAPPERS:
        inner = content.get(wrapper)
        if isinstance(inner, Mapping):
            return _unwrapped(inner)
    return content


def _unreadable(path: str | os.PathLike[str], reason: str, remedy: str) -> CheckpointError:
    return CheckpointError(
        f"{os.fspath(path)} cannot be read ({reason})",
        "a .pth file with a state dict of tensors",
        remedy,
    )


def _bad_classes(path: str | os.PathLike[str], reason: str) -> CheckpointError:
    return CheckpointError(
        f"class file {os.fspath(path)} cannot be used ({reason})",
        '{"0": "first class", "1": "second class", ...}, numbered without gaps',
        "correct it, or use the class_indices.json that the training script wrote",
    )
