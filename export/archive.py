"""A checkpoint as a TorchServe archive (.mar): a ZIP with a manifest, and no pickle in it.

Written here and not by ``torch-model-archiver``: that packs by way of ``$TMPDIR/<model name>``,
which it deletes first, and stamps the time, so that two archives of one checkpoint differ.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import zipfile
from pathlib import Path

from mambamic._version import __version__
from mambamic.checkpoint import (
    CARD_FILE,
    CONFIG_FILE,
    OOD_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    load_checkpoint,
)
from mambamic.errors import UsageError
from mambamic.graph.onnx import ONNX_FILE
from mambamic.ood import load_detector

FORMATS = ("torch", "onnx")
MANIFEST_FILE = "MAR-INF/MANIFEST.json"
MODEL_CONFIG_FILE = "model-config.yaml"
# Not the name of a package: the file's folder comes first on the worker's path.
HANDLER_FILE = "mambamic_service.py"

# A batch that takes longer fails as a whole, and its worker is killed: enough for 256 large tiles
# on a slow CPU, and as much again for what came before them in the batch.
RESPONSE_TIMEOUT_S = 300

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_VERSION = re.compile(r"[0-9]+(\.[0-9]+)*")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that ZIP can express

# TorchServe takes the one class that is defined in this very file; an imported one is not seen.
_HANDLER = '''\
"""What TorchServe calls; everything is in mambamic, which must be installed beside it."""

from mambamic.handlers.service import ImageClassifier


class MambamicHandler(ImageClassifier):
    """The handler of this archive."""
'''


def write_archive(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model_name: str = "mambamic",
    version: str = "1.0",
    batch_size: int = 32,
    max_batch_delay: int = 1,
    workers: int = 1,
    response_timeout: int = RESPONSE_TIMEOUT_S,
    startup_timeout: int = 120,
    form: str = "torch",
) -> Path:
    """Pack a checkpoint; the same checkpoint and settings give the same bytes.

    Args:
        checkpoint: The folder.
        out: The file to write; one that is there is replaced.
        model_name: Under which TorchServe serves it.
        version: Of the model, digits and dots.
        batch_size: Requests that the handler gets at a time, at most.
        max_batch_delay: Milliseconds that a request waits for others.
        workers: Processes.
        response_timeout: Seconds after which a worker that does not answer is killed.
        startup_timeout: Seconds that a worker may take to load.
        form: ``torch``, the weights; or ``onnx``, a file for ONNX Runtime in their place.

    Returns:
        The path of the archive.

    Raises:
        CheckpointError: The checkpoint is incomplete, or its weights have another hash.
        UsageError: A name, version or number that TorchServe cannot take.
    """
    check_label(model_name, version)
    if form not in FORMATS:
        raise UsageError(f"format {form!r}", f"one of {', '.join(FORMATS)}", "choose one of these")
    settings = {
        "minWorkers": workers,
        "maxWorkers": workers,
        "batchSize": batch_size,
        "maxBatchDelay": max_batch_delay,
        "responseTimeout": response_timeout,
        "startupTimeout": startup_timeout,
    }
    for key, value in settings.items():
        if value < 1:
            raise UsageError(f"{key} {value}", "at least 1", "give a larger number")
    opened = load_checkpoint(checkpoint)
    contents = {
        MANIFEST_FILE: _manifest(model_name, version).encode(),
        MODEL_CONFIG_FILE: _model_config(settings).encode(),
        HANDLER_FILE: _HANDLER.encode(),
        CONFIG_FILE: opened.config.to_json().encode(),
        CARD_FILE: opened.card().encode(),
        **_network(opened, form),
    }
    detector = load_detector(opened)
    if detector is not None:
        contents[OOD_FILE] = detector.to_bytes(opened.config.weights_sha256)
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        fresh = Path(scratch, target.name)
        _write_zip(fresh, contents)
        fresh.replace(target)
    return target


def _network(checkpoint: Checkpoint, form: str) -> dict[str, bytes]:
    if form == "torch":
        return {WEIGHTS_FILE: checkpoint.weights()}
    # Here, because packing weights needs neither torch nor onnx.
    from mambamic.export.onnx_export import serialise

    return {ONNX_FILE: serialise(checkpoint)}


def check_label(model_name: str, version: str) -> None:
    """Check the name and version under which TorchServe is to serve a model.

    Args:
        model_name: Becomes part of a path and of a URL.
        version: Digits and dots.

    Raises:
        UsageError: TorchServe cannot take one of them.
    """
    if not _NAME.fullmatch(model_name):
        raise UsageError(
            f"model name {model_name!r}",
            "letters, digits, '.', '-' and '_', the first a letter or digit",
            "choose another",
        )
    if not _VERSION.fullmatch(version):
        raise UsageError(f"version {version!r}", "digits and dots, such as 1.0", "choose another")


def _manifest(model_name: str, version: str) -> str:
    manifest = {
        "runtime": "python",
        "model": {
            "modelName": model_name,
            "modelVersion": version,
            "handler": HANDLER_FILE,
            "configFile": MODEL_CONFIG_FILE,
        },
        "archiverVersion": "0.12.0",
    }
    return json.dumps(manifest, indent=2) + "\n"


def _model_config(settings: dict[str, int]) -> str:
    lines = [f"{key}: {value}" for key, value in settings.items()]
    return "\n".join([*lines, "mambamic:", f"  version: {json.dumps(__version__)}", ""])


def _write_zip(path: Path, contents: dict[str, bytes]) -> None:
    # Stored: weights do not compress, and deflated bytes differ between versions of zlib.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in contents.items():
            info = zipfile.ZipInfo(name, _EPOCH)
            info.external_attr = 0o644 << 16
            archive.writestr(info, content)
