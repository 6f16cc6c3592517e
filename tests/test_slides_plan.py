from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mambamic.slides.inputs import SlideInput, find_inputs
from mambamic.slides.inspection import Inspection, Refusal, inspect, inspect_all
from mambamic.slides.models import ModelChoice
from mambamic.slides.plan import make_plan, read_plan, write_plan
from mambamic.slides.read import UNREADABLE, Source, TileReader
from mambamic.slides.resolution import ResolutionError
from mambamic.slides.scorers import checkpoint_facts
from mambamic.slides.settings import PART, ModelFacts, Settings, settings_for

from .slide_files import blobs, write_slide


@pytest.fixture(scope="module")
def model(random_checkpoint: Path) -> ModelFacts:
    return checkpoint_facts(random_checkpoint)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "s.tiff"
    return write_slide(path, (4096, 2048), 3, blobs([(1000, 1000, 600)]), mpp=0.25)


def _settings(model: ModelFacts, **stated: Any) -> Settings:
    usual = {"tile": None, "stride": None, "own_pixels": False, "target_mpp": 0.5}
    return settings_for(model, **{**usual, **stated})


def test_a_plan_is_read_as_it_was_written(slide: Path, model: ModelFacts, tmp_path: Path) -> None:
    settings = _settings(model, stride=16)
    seen = inspect(SlideInput(slide, slide.name), model, settings)
    planned = make_plan(seen, settings)
    folder = tmp_path / seen.folder
    write_plan(folder, seen, planned, model)
    plan = read_plan(folder, seen.key)
    assert plan is not None
    assert len(plan) == planned.facts["tiles"] > PART
    for name in ("x", "y", "tissue"):
        assert np.array_equal(getattr(plan, name), getattr(planned.plan, name))
    assert sum(plan.part(n).stop - plan.part(n).start for n in range(plan.parts)) == len(plan)
    assert read_plan(folder, "another key") is None
    assert (plan.tissue >= 0.1).all()


def test_the_key_is_of_content_model_and_settings(
    slide: Path, model: ModelFacts, tmp_path: Path, random_checkpoint: Path
) -> None:
    import dataclasses

    def key(path: Path = slide, facts: ModelFacts = model, **stated: Any) -> str:
        return inspect(SlideInput(path, "n"), facts, _settings(model, **stated)).key

    copy = tmp_path / "elsewhere.tiff"
    copy.write_bytes(slide.read_bytes())
    assert key() == key(copy), "wherever it lies"
    changed = bytearray(slide.read_bytes())
    changed[-1] ^= 1
    copy.write_bytes(changed)
    keys = {
        key(),
        key(copy),
        key(facts=dataclasses.replace(model, identity="0")),
        key(tile=65),
        key(stride=65),
        key(target_mpp=0.6),
        key(mpp=0.3),
        key(tissue="none"),
        key(min_tissue=0.2),
        key(embeddings=True),
        key(own_pixels=True, target_mpp=None),
        key(own_pixels=True, target_mpp=None, mpp=0.3),
        key(facts=ModelChoice(random_checkpoint, dtype="float16").facts()),
    }
    assert len(keys) == 13
    assert key(facts=ModelChoice(random_checkpoint).facts()) == key()
    assert key(mpp=0.25) == key(), "whoever says so"


def test_all_slides_without_microns_are_named_at_once(
    tmp_path: Path, slide: Path, model: ModelFacts
) -> None:
    inputs = [SlideInput(slide, "good")]
    for name in ("one", "two"):
        path = write_slide(tmp_path / f"{name}.tiff", (512, 512), 1, blobs([]), mpp=None)
        inputs.append(SlideInput(path, name))
    with pytest.raises(ResolutionError, match=r"one: .*; two: "):
        inspect_all(inputs, model, _settings(model))
    own = _settings(model, own_pixels=True, target_mpp=None)
    assert all(isinstance(seen, Inspection) for seen in inspect_all(inputs, model, own)[0])


def test_what_cannot_be_opened_is_a_refusal_and_twins_are_one(
    tmp_path: Path, slide: Path, model: ModelFacts, data_dir: Path
) -> None:
    (tmp_path / "broken.svs").write_bytes(b"no slide")
    inputs = [SlideInput(tmp_path / "broken.svs", "b"), SlideInput(slide, "s")]
    (refused, seen), _ = inspect_all(inputs, model, _settings(model))
    assert isinstance(refused, Refusal)
    assert isinstance(seen, Inspection)
    own = _settings(model, own_pixels=True, target_mpp=None)
    dicom, _ = find_inputs([str(data_dir / "slides" / "op_boxes_*.dcm")])
    assert len(dicom) == 2
    levels, left_out = inspect_all(dicom, model, own)
    assert len(levels) == 1, "DICOM has a file per level"
    assert left_out == []


def test_a_coarse_slide_is_said_to_be_enlarged(slide: Path, model: ModelFacts) -> None:
    settings = _settings(model, target_mpp=0.125)
    seen = inspect(SlideInput(slide, "s"), model, settings)
    assert "2.0 times coarser" in seen.notes[0]


def _coloured(folder: Path, colours: dict[str, int]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, colour in colours.items():
        Image.new("RGB", (30, 30), (colour, 0, 0)).save(folder / name)
    return folder


def test_a_tile_is_read_by_its_name_whatever_else_comes_and_goes(
    tmp_path: Path, model: ModelFacts
) -> None:
    folder = _coloured(tmp_path / "tiles", {"b.png": 20, "c.png": 30, "d.png": 40})
    settings = _settings(model, own_pixels=True, target_mpp=None)
    plan = make_plan(inspect(SlideInput(folder, "t", tiles=True), model, settings), settings).plan
    assert plan.names == ["b.png", "c.png", "d.png"]
    _coloured(folder, {"a.png": 10})
    (folder / "b.png").unlink()
    pixels = np.zeros((3, 64, 64, 3), np.uint8)
    source = Source(folder, True, 0, 0, model.preprocess)
    report = TileReader().read(source, plan.places(range(3)), pixels)
    assert [(failure.at, failure.status) for failure in report.failures] == [(0, UNREADABLE)]
    assert [int(tile[5, 5, 0]) for tile in pixels] == [0, 30, 40]


def test_one_file_that_cannot_be_read_is_one_row_of_a_set(
    tmp_path: Path, model: ModelFacts
) -> None:
    folder = _coloured(tmp_path / "tiles", {"a.png": 10})
    (folder / "b.png").symlink_to("/proc/self/mem")  # reading it is an error, for root too
    settings = _settings(model, own_pixels=True, target_mpp=None)
    seen = inspect(SlideInput(folder, "t", tiles=True), model, settings)
    plan = make_plan(seen, settings).plan
    source = Source(folder, True, 0, 0, model.preprocess)
    pixels = np.zeros((2, 64, 64, 3), np.uint8)
    report = TileReader().read(source, plan.places(range(2)), pixels)
    assert [failure.at for failure in report.failures] == [1]
    (folder / "b.png").unlink()
    _coloured(folder, {"b.png": 20})
    assert inspect(seen.given, model, settings).key != seen.key, "to be scored when it is back"


def test_a_copy_of_the_same_name_is_left_out_with_a_line(
    tmp_path: Path, slide: Path, model: ModelFacts
) -> None:
    copy = tmp_path / slide.name
    copy.write_bytes(slide.read_bytes())
    inputs, _ = find_inputs([str(slide), str(copy)])
    seen, (line,) = inspect_all(inputs, model, _settings(model))
    assert len(seen) == 1
    assert line == f"{copy}: left out, it is a copy of {slide}"
