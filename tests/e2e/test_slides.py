"""Slides against a real server, the pages in a real browser, and the mosaic against its truth."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from mambamic import Classifier
from mambamic.slides.source import open_slide

from ..slide_runs import only, score, table
from .servers import RunningServer

SHOT = os.environ.get("MAMBAMIC_SCREENSHOT")
TILE = 200
CORNER = 6  # rows and columns


@pytest.fixture(scope="module")
def truth(data_dir: Path) -> dict[tuple[int, int], str]:
    cells = json.loads((data_dir / "slides" / "pbc_mosaic.truth.json").read_text())
    return {(cell["x"], cell["y"]): cell["label"] for cell in cells}


@pytest.fixture(scope="module")
def mosaic(data_dir: Path) -> Path:
    return data_dir / "slides" / "pbc_mosaic.tiff"


def _corner(path: Path) -> Path:
    """An annotation of the first rows and columns of the mosaic."""
    end = CORNER * TILE
    ring = [[0, 0], [end, 0], [end, end], [0, end], [0, 0]]
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    return path


@pytest.fixture(scope="module")
def scored(mosaic: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a corner of the mosaic, blanks and all."""
    base = tmp_path_factory.mktemp("mosaic")
    done = score(
        mosaic,
        *("--model", checkpoint, "--out", base / "out", "--tile-px", "--tile", TILE),
        *(
            "--tissue",
            _corner(base / "corner.geojson"),
            "--min-tissue",
            1,
            "--device",
            "cpu",
        ),
        *("--embeddings",),
    )
    assert done.returncode == 0, done.stderr
    return only(base / "out")


def _one_by_one(mosaic: Path, classifier: Classifier, rows: list[dict[str, Any]]) -> np.ndarray:
    slide = open_slide(mosaic)
    size = (TILE, TILE)
    said = []
    for row in rows:
        (prediction,) = classifier.predict([slide.read(row["x"], row["y"], 0, size)])
        said.append(list(prediction.probabilities.values()))
    slide.close()
    return np.array(said)


def _scores(rows: pa.Table, classifier: Classifier) -> np.ndarray:
    names = classifier.config.classes
    return np.stack([rows[f"probability_{name}"].to_numpy() for name in names], 1)


def _accuracy(scores: np.ndarray, labels: list[str], classes: tuple[str, ...]) -> float:
    right = [classes[n] == label for n, label in zip(scores.argmax(1), labels, strict=True)]
    return float(np.mean([r for r, label in zip(right, labels, strict=True) if label != "blank"]))


def test_a_corner_of_the_mosaic_is_as_its_cells_one_by_one(
    scored: Path, mosaic: Path, classifier: Classifier, truth: dict[tuple[int, int], str]
) -> None:
    rows = table(scored)
    assert rows.num_rows == CORNER**2
    labels = [
        truth[x, y] for x, y in zip(rows["x"].to_pylist(), rows["y"].to_pylist(), strict=True)
    ]
    ours = _scores(rows, classifier)
    alone = _one_by_one(mosaic, classifier, rows.to_pylist())
    assert np.abs(ours - alone).max() < 1e-4
    accuracy = _accuracy(ours, labels, classifier.config.classes)
    assert accuracy > 0.9
    assert accuracy == _accuracy(alone, labels, classifier.config.classes)


@pytest.mark.soak
@pytest.mark.parametrize("tissue", ["none", "otsu"])
def test_the_whole_mosaic_is_as_accurate_as_its_cells_one_by_one(
    tissue: str, mosaic: Path, checkpoint: Path, classifier: Classifier, tmp_path: Path,
    truth: dict[tuple[int, int], str],
) -> None:  # fmt: skip
    done = score(
        mosaic,
        *("--model", checkpoint, "--out", tmp_path, "--tile-px", "--tile", TILE),
        *("--tissue", tissue, "--device", "cpu"),
    )
    assert done.returncode == 0, done.stderr
    rows = table(only(tmp_path))
    labels = [
        truth[x, y] for x, y in zip(rows["x"].to_pylist(), rows["y"].to_pylist(), strict=True)
    ]
    cells = sum(label != "blank" for label in labels)
    if tissue == "none":
        assert (len(labels), cells) == (1296, 1176)
    else:
        assert len(labels) == cells, "all 120 blanks are left out"
        assert cells >= 0.99 * 1176
    ours = _accuracy(_scores(rows, classifier), labels, classifier.config.classes)
    alone = _one_by_one(mosaic, classifier, rows.to_pylist())
    assert abs(ours - _accuracy(alone, labels, classifier.config.classes)) <= 0.005
    print(f"{tissue}: {len(labels)} tiles, {cells} cells, accuracy {ours:.4f}")


def test_a_server_gives_the_same_scores_and_so_does_a_request_of_a_users_own(
    scored: Path, mosaic: Path, checkpoint: Path, server: RunningServer, tmp_path: Path
) -> None:
    done = score(
        mosaic,
        *("--model", checkpoint, "--out", tmp_path / "out", "--tile-px", "--tile", TILE),
        *(
            "--tissue",
            _corner(tmp_path / "corner.geojson"),
            "--min-tissue",
            1,
            "--embeddings",
        ),
        *("--server", f"http://127.0.0.1:{server.port}"),
    )
    assert done.returncode == 0, done.stderr
    folder = only(tmp_path / "out")
    assert folder.name == scored.name, "the same work, whoever did it"
    here, there = table(scored), table(folder)
    for name in here.column_names:
        if name.startswith("probability"):
            assert np.abs(here[name].to_numpy() - there[name].to_numpy()).max() < 1e-4
        elif name != "embedding":
            assert here[name].equals(there[name])
    gap = np.array(here["embedding"].to_pylist()) - np.array(there["embedding"].to_pylist())
    assert np.abs(gap).max() < 1e-3
    slide = open_slide(mosaic)
    for row in here.to_pylist()[::9]:
        buffer = io.BytesIO()
        slide.read(row["x"], row["y"], 0, (TILE, TILE)).save(buffer, "PNG")
        answer = server.body(buffer.getvalue()).json
        assert answer["label"] == row["top_class"]
        for name, probability in answer["probabilities"].items():
            assert row[f"probability_{name}"] == pytest.approx(probability, abs=1e-4)
    slide.close()


def test_a_server_with_another_model_is_refused(
    mosaic: Path, quick_checkpoint: Path, server: RunningServer, tmp_path: Path
) -> None:
    done = score(
        mosaic,
        *("--model", quick_checkpoint, "--out", tmp_path / "out", "--tile-px"),
        *("--server", f"http://127.0.0.1:{server.port}"),
    )
    assert done.returncode == 2
    assert "has another model" in done.stderr


def test_no_server_is_a_failure_that_says_so(
    mosaic: Path, checkpoint: Path, tmp_path: Path
) -> None:
    done = score(
        mosaic,
        *("--model", checkpoint, "--out", tmp_path / "out", "--tile-px"),
        *("--server", "http://127.0.0.1:18799/path"),
    )
    assert done.returncode == 2
    assert "http://HOST:PORT" in done.stderr


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    profile = tmp_path_factory.mktemp("profile")
    options = Options()
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--window-size=1100,1500", "--no-proxy-server", f"--user-data-dir={profile}"),
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium is not None, "on Debian, apt-get install chromium chromium-driver"
    assert driver is not None, "on Debian, apt-get install chromium chromium-driver"
    options.binary_location = chromium
    started = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield started
    finally:
        started.quit()


def _complaints(browser: WebDriver) -> list[str]:
    entries = browser.get_log("browser")  # type: ignore[no-untyped-call]
    return [entry["message"] for entry in entries]


def _map(browser: WebDriver) -> np.ndarray:
    shot = browser.find_element(By.ID, "map").screenshot_as_png
    with Image.open(io.BytesIO(shot)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_the_page_shows_layers_with_any_opacity(scored: Path, browser: WebDriver) -> None:
    browser.get((scored / "report.html").as_uri())
    assert browser.find_element(By.TAG_NAME, "h1").text == "pbc_mosaic.tiff"
    if SHOT:
        browser.save_screenshot(SHOT)
    slider = browser.find_element(By.ID, "opacity")
    seen = {}
    for value in (0, 50, 100):
        browser.execute_script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))",
            slider,
            value,
        )
        seen[value] = _map(browser)
    assert not np.array_equal(seen[0], seen[100])
    between = (seen[0] + seen[100]) / 2
    assert np.abs(seen[50] - between).mean() < 2
    choice = Select(browser.find_element(By.ID, "layer"))
    assert len(choice.options) == 9
    choice.select_by_visible_text("probability of neutrophil")
    assert not np.array_equal(_map(browser), seen[100])
    assert browser.find_element(By.ID, "heat").is_displayed()
    assert not browser.find_element(By.ID, "legend").is_displayed()
    assert len(browser.find_elements(By.CSS_SELECTOR, ".gallery img")) > 8
    for picture in browser.find_elements(By.TAG_NAME, "img"):
        assert browser.execute_script("return arguments[0].naturalWidth", picture) > 0
    assert _complaints(browser) == [], "nothing was refused or is missing"
    text = (scored / "report.html").read_text()
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert 'src="data:' in text


def test_the_page_over_all_slides_leads_to_each(scored: Path, browser: WebDriver) -> None:
    browser.get((scored.parent / "report.html").as_uri())
    (link,) = browser.find_elements(By.TAG_NAME, "a")
    link.click()
    assert browser.find_element(By.TAG_NAME, "h1").text == "pbc_mosaic.tiff"
    assert _complaints(browser) == []
