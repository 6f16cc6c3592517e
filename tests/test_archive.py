"""Archives for TorchServe: what must be in them, and nothing that could run."""

from __future__ import annotations

import ast
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import yaml

from mambamic._version import __version__
from mambamic.checkpoint import FILES, WEIGHTS_FILE
from mambamic.errors import CheckpointError, UsageError
from mambamic.export.archive import write_archive


def test_contents(random_checkpoint: Path, tmp_path: Path) -> None:
    path = write_archive(
        random_checkpoint, tmp_path / "new/x.mar", model_name="cells", version="2.1", batch_size=8
    )
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        contents = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(contents.pop("MAR-INF/MANIFEST.json"))
    assert manifest["runtime"] == "python"
    handler, config = manifest["model"]["handler"], manifest["model"]["configFile"]
    assert manifest["model"] == {
        "modelName": "cells",
        "modelVersion": "2.1",
        "handler": handler,
        "configFile": config,
    }
    assert contents.keys() == {handler, config, *FILES}
    for name in FILES:
        assert contents[name] == (random_checkpoint / name).read_bytes()
    assert yaml.safe_load(contents[config]) == {
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": 8,
        "maxBatchDelay": 1,
        "responseTimeout": 300,
        "startupTimeout": 120,
        "mambamic": {"version": __version__},
    }
    classes = [node for node in ast.parse(contents[handler]).body if isinstance(node, ast.ClassDef)]
    assert len(classes) == 1


def test_torchserve_finds_the_one_class(random_checkpoint: Path, tmp_path: Path) -> None:
    # By the worker's own loader, so with its own rule of which classes count.
    import importlib.util

    from ts.utils.util import list_classes_from_module

    from mambamic.handlers.service import ImageClassifier

    path = write_archive(random_checkpoint, tmp_path / "x.mar")
    with zipfile.ZipFile(path) as archive:
        handler = json.loads(archive.read("MAR-INF/MANIFEST.json"))["model"]["handler"]
        archive.extract(handler, tmp_path)
    assert importlib.util.find_spec(Path(handler).stem) is None
    spec = importlib.util.spec_from_file_location(Path(handler).stem, tmp_path / handler)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (found,) = list_classes_from_module(module)
    assert issubclass(found, ImageClassifier)


def test_same_bytes_each_time(random_checkpoint: Path, tmp_path: Path) -> None:
    first, second = (
        write_archive(random_checkpoint, tmp_path / name).read_bytes()
        for name in ("1.mar", "2.mar")
    )
    assert first == second


def test_other_weights_are_refused(random_checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(random_checkpoint, tmp_path / "copy"))
    data = bytearray((copy / WEIGHTS_FILE).read_bytes())
    data[-1] ^= 1
    (copy / WEIGHTS_FILE).write_bytes(data)
    with pytest.raises(CheckpointError, match="has SHA-256"):
        write_archive(copy, tmp_path / "x.mar")
    assert not (tmp_path / "x.mar").exists()


@pytest.mark.parametrize(
    "wrong",
    [{"model_name": "a/b"}, {"model_name": ""}, {"version": "new"}, {"batch_size": 0}],
)
def test_wrong_settings(wrong: dict[str, object], random_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        write_archive(random_checkpoint, tmp_path / "x.mar", **wrong)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
