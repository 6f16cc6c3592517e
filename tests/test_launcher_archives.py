from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import yaml

from mambamic.errors import CheckpointError, UsageError
from mambamic.export.archive import MANIFEST_FILE, MODEL_CONFIG_FILE, write_archive
from mambamic.launcher.archives import Model, ModelSpec, prepare
from mambamic.launcher.settings import Settings


@pytest.mark.parametrize(
    ("label", "name", "version"),
    [("", None, None), ("=cells", "cells", None), ("=cells:2.1", "cells", "2.1")],
)
def test_a_spec_is_read(tmp_path: Path, label: str, name: str | None, version: str | None) -> None:
    assert ModelSpec.parse(f"{tmp_path}{label}") == ModelSpec(tmp_path, name, version)


def test_a_path_may_hold_an_equals_sign(tmp_path: Path) -> None:
    folder = tmp_path / "run=3"
    folder.mkdir()
    assert ModelSpec.parse(str(folder)) == ModelSpec(folder)
    assert ModelSpec.parse(f"{folder}=cells") == ModelSpec(folder, "cells")


@pytest.mark.parametrize("label", ["=a/b", "=cells:one", "=-x"])
def test_names_that_cannot_be_used(tmp_path: Path, label: str) -> None:
    with pytest.raises(UsageError, match="NAME:VERSION"):
        ModelSpec.parse(f"{tmp_path}{label}")


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gone does not exist"):
        ModelSpec.parse(f"{tmp_path / 'gone'}=cells")


def test_checkpoints_and_archives_get_the_settings(random_checkpoint: Path, tmp_path: Path) -> None:
    archive = write_archive(
        random_checkpoint, tmp_path / "given.mar", model_name="given", version="3.0"
    )
    settings = Settings(
        workers=2, batch_size=5, max_batch_delay=7, device="cpu", backend="cpu", decoders=3
    )
    store = tmp_path / "store"
    specs = [ModelSpec(random_checkpoint), ModelSpec(archive), ModelSpec(archive, "other", "4.0")]
    models = prepare(specs, settings, store)
    assert models == [
        Model("mambamic", "1.0", "0.mar"),
        Model("given", "3.0", "1.mar"),
        Model("other", "4.0", "2.mar"),
    ]
    assert models[2].path == "/predictions/other/4.0"
    assert sorted(path.name for path in store.iterdir()) == ["0.mar", "1.mar", "2.mar"]
    for model in models:
        with zipfile.ZipFile(store / model.archive) as packed, zipfile.ZipFile(archive) as given:
            manifest = json.loads(packed.read(MANIFEST_FILE))["model"]
            assert (manifest["modelName"], manifest["modelVersion"]) == (model.name, model.version)
            config = yaml.safe_load(packed.read(MODEL_CONFIG_FILE))
            written = yaml.safe_load(given.read(MODEL_CONFIG_FILE))
            assert packed.read("model.safetensors") == given.read("model.safetensors")
            assert sorted(packed.namelist()) == sorted(given.namelist())
        assert (config["minWorkers"], config["maxWorkers"]) == (2, 2)
        assert (config["batchSize"], config["maxBatchDelay"]) == (5, 7)
        assert config["responseTimeout"] == written["responseTimeout"]
        asked = {"device": "cpu", "backend": "cpu", "decoders": 3}
        assert config["mambamic"] == {**written["mambamic"], **asked}


def test_two_models_of_one_name_and_version(random_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"mambamic, version 1\.0"):
        prepare([ModelSpec(random_checkpoint)] * 2, Settings(), tmp_path / "store")


def test_what_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "text.mar").write_text("hello")
    with zipfile.ZipFile(tmp_path / "empty.mar", "w") as archive:
        archive.writestr("readme", "hello")
    for name in ("text.mar", "empty.mar"):
        with pytest.raises(CheckpointError, match="mambamic archive"):
            prepare([ModelSpec(tmp_path / name)], Settings(), tmp_path / "store")


def remade(archive: Path, target: Path, **members: bytes) -> Path:
    """A copy of an archive with some of its members exchanged."""
    names = {"manifest": MANIFEST_FILE, "config": MODEL_CONFIG_FILE}
    ours = {names[key]: content for key, content in members.items()}
    with zipfile.ZipFile(archive) as given, zipfile.ZipFile(target, "w") as copy:
        for info in given.infolist():
            copy.writestr(info.filename, ours.get(info.filename, given.read(info)))
    return target


def manifest(**changes: object) -> bytes:
    model = {"modelName": "cells", "modelVersion": "1.0", "handler": "mambamic_service.py"}
    return json.dumps({"model": model | changes}).encode()


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"manifest": b"[]"}, "not a mapping"),
        ({"manifest": b'{"model": null}'}, "None, not a mapping"),
        ({"manifest": b"{"}, "not a model archive"),
        ({"manifest": manifest(modelName="a/../b\n")}, "model name 'a/../b"),
        ({"manifest": manifest(modelName=None)}, "model name"),
        ({"manifest": manifest(modelVersion="1/2")}, "version '1/2'"),
        ({"config": b"a: [1, 2"}, "not a model archive"),
        ({"config": b"- 1\n- 2\n"}, "not a mapping"),
    ],
)
def test_what_foreign_archives_state_is_checked(
    members: dict[str, bytes], said: str, random_checkpoint: Path, tmp_path: Path
) -> None:
    given = write_archive(random_checkpoint, tmp_path / "given.mar")
    foreign = remade(given, tmp_path / "foreign.mar", **members)
    with pytest.raises(CheckpointError, match=said):
        prepare([ModelSpec(foreign)], Settings(), tmp_path / "store")


def test_a_name_of_ones_own_mends_an_unusable_one(random_checkpoint: Path, tmp_path: Path) -> None:
    given = write_archive(random_checkpoint, tmp_path / "given.mar")
    foreign = remade(given, tmp_path / "foreign.mar", manifest=manifest(modelName="a b"))
    (model,) = prepare([ModelSpec(foreign, "cells")], Settings(), tmp_path / "store")
    assert (model.name, model.version) == ("cells", "1.0")
