"""The archives of one server: checkpoints are packed, archives are copied, settings written in.

TorchServe takes the settings inside an archive over those of its configuration file, so what was
asked for on the command line is written into a copy of the archive.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambamic.errors import CheckpointError, UsageError
from mambamic.export.archive import MANIFEST_FILE, MODEL_CONFIG_FILE, check_label, write_archive
from mambamic.launcher.settings import Settings

DEFAULT_NAME = "mambamic"
DEFAULT_VERSION = "1.0"


@dataclass(frozen=True)
class ModelSpec:
    """One ``--model``: a checkpoint folder or an archive, and the name and version it gets.

    A checkpoint is called ``mambamic``, version 1.0, unless said otherwise; an archive keeps what
    is written in it.
    """

    source: Path
    name: str | None = None
    version: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """Read ``SOURCE[=NAME[:VERSION]]``.

        Raises:
            UsageError: The source does not exist, or the name or version cannot be used.
        """
        # A path may hold "=": the whole text counts as one where it exists.
        source, _, label = (text, "", "") if Path(text).exists() else text.rpartition("=")
        if not source:
            source, label = text, ""
        name, _, version = label.partition(":")
        if not Path(source).exists():
            raise UsageError(
                f"--model {text}: {source} does not exist",
                "a checkpoint folder or a .mar archive",
                "give its path",
            )
        try:
            check_label(name or DEFAULT_NAME, version or DEFAULT_VERSION)
        except UsageError as error:
            raise UsageError(
                f"--model {text}: {error.problem}",
                error.expected,
                "write SOURCE=NAME:VERSION, for example model_store/cells=cells:1.0",
            ) from error
        return cls(Path(source), name or None, version or None)


@dataclass(frozen=True)
class Model:
    """A model as it is served."""

    name: str
    version: str
    archive: str

    @property
    def path(self) -> str:
        """Its path on the inference port."""
        return f"/predictions/{self.name}/{self.version}"


def prepare(specs: Sequence[ModelSpec], settings: Settings, store: Path) -> list[Model]:
    """Fill a model store, after emptying it.

    Args:
        specs: What to serve.
        settings: Written into each archive.
        store: The folder to fill.

    Raises:
        CheckpointError: A checkpoint or archive cannot be used.
        UsageError: Two models have the same name and version.
    """
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir(parents=True)
    models: list[Model] = []
    for number, spec in enumerate(specs):
        with tempfile.TemporaryDirectory(dir=store) as scratch:
            source = spec.source if spec.source.is_file() else _pack(spec, Path(scratch))
            model = _adapt(source, store / f"{number}.mar", spec, settings)
        if any((model.name, model.version) == (other.name, other.version) for other in models):
            raise UsageError(
                f"two models are called {model.name}, version {model.version}",
                "a distinct name or version for each",
                "add =NAME:VERSION to --model",
            )
        models.append(model)
    return models


def _pack(spec: ModelSpec, scratch: Path) -> Path:
    out = scratch / "model.mar"
    write_archive(
        spec.source,
        out,
        model_name=spec.name or DEFAULT_NAME,
        version=spec.version or DEFAULT_VERSION,
    )
    return out


def _adapt(source: Path, target: Path, spec: ModelSpec, settings: Settings) -> Model:
    import yaml

    try:
        with zipfile.ZipFile(source) as archive:
            manifest = _mapping(json.loads(archive.read(MANIFEST_FILE)), MANIFEST_FILE)
            model = _mapping(manifest["model"], f'"model" in {MANIFEST_FILE}')
            config_name = str(model.get("configFile", MODEL_CONFIG_FILE))
            stated = archive.read(config_name) if config_name in archive.namelist() else b""
            model["configFile"] = config_name
            model["modelName"] = spec.name or str(model["modelName"] or "")
            model["modelVersion"] = spec.version or str(model["modelVersion"])
            check_label(model["modelName"], model["modelVersion"])
            ours = {
                MANIFEST_FILE: json.dumps(manifest, indent=2).encode(),
                config_name: _with_settings(stated, settings),
            }
            with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as copy:
                for info in archive.infolist():
                    if info.filename not in ours and not info.is_dir():
                        copy.writestr(info.filename, archive.read(info))
                for name, content in ours.items():
                    copy.writestr(name, content)
    # A member may be encrypted, or packed in a way that zipfile cannot read: RuntimeError.
    except (
        zipfile.BadZipFile,
        zlib.error,
        yaml.YAMLError,
        KeyError,
        RuntimeError,
        UsageError,
        ValueError,
    ) as error:
        raise CheckpointError(
            f"{source} is not a model archive ({error})",
            "a .mar file with a manifest, or a checkpoint folder",
            "write one by: mambamic archive CHECKPOINT",
        ) from error
    return Model(model["modelName"], model["modelVersion"], target.name)


def _mapping(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {repr(value)[:80]}, not a mapping")
    return value


def _with_settings(stated: bytes, settings: Settings) -> bytes:
    import yaml

    config = _mapping(yaml.safe_load(stated) or {}, "its configuration")
    own = config.get("mambamic", {})
    section: Mapping[str, Any] = own if isinstance(own, dict) else {"version": own}
    config |= {
        "minWorkers": settings.workers,
        "maxWorkers": settings.workers,
        "batchSize": settings.batch_size,
        "maxBatchDelay": settings.max_batch_delay,
        "mambamic": {
            **section,
            "device": settings.device,
            "backend": settings.backend,
            "decoders": settings.decoders,
        },
    }
    text: str = yaml.safe_dump(config, sort_keys=False)
    return text.encode()
