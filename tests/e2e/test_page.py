"""The page at the edge's root, in a real browser."""

from __future__ import annotations

import base64
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from .edges import RunningEdge, edge
from .servers import ROOT, RunningServer, wait_for

CELL = ROOT / "examples" / "cell.png"
SHOT = os.environ.get("MAMBAMIC_SCREENSHOT")
PATIENCE = 60


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mambamic-test-") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def running(server: RunningServer, folder: Path) -> Iterator[RunningEdge]:
    with edge(folder, "--max-body", "1", ports=[server.port]) as front:
        yield front


@pytest.fixture(scope="module")
def started(folder: Path) -> Iterator[WebDriver]:
    options = Options()
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--window-size=1100,1420", "--no-proxy-server", f"--user-data-dir={folder / 'profile'}"),
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium is not None, "on Debian, apt-get install chromium chromium-driver"
    assert driver is not None, "on Debian, apt-get install chromium chromium-driver"
    options.binary_location = chromium
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield browser
    finally:
        browser.quit()


@pytest.fixture
def browser(started: WebDriver, running: RunningEdge) -> WebDriver:
    """A browser that has just opened the page."""
    started.get(f"http://127.0.0.1:{running.port}/")
    return started


def text(browser: WebDriver, name: str) -> str:
    return browser.find_element(By.ID, name).text


def wait_until_shown(browser: WebDriver, name: str) -> None:
    WebDriverWait(browser, PATIENCE).until(
        lambda _: browser.find_element(By.ID, name).is_displayed(), f"{name} did not show"
    )


def choose(browser: WebDriver, path: Path) -> None:
    browser.find_element(By.ID, "file").send_keys(str(path))


def complaints(browser: WebDriver) -> list[str]:
    """What the browser has to say of scripts, styles and policies; failed requests are wanted."""
    entries = browser.get_log("browser")  # type: ignore[no-untyped-call]
    return [entry["message"] for entry in entries if entry["source"] != "network"]


def test_a_cell_is_classified_and_explained(browser: WebDriver, running: RunningEdge) -> None:
    assert "For research use only" in browser.find_element(By.TAG_NAME, "body").text
    choose(browser, CELL)
    wait_until_shown(browser, "answer")
    assert text(browser, "label") == "neutrophil"
    rows = browser.find_elements(By.CSS_SELECTOR, "#classes tr")
    assert len(rows) == 8
    assert rows[0].text.split() == ["neutrophil", "99.8", "%"]
    widths = [row.find_element(By.CLASS_NAME, "bar").size["width"] for row in rows]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 5 * widths[1]
    assert browser.find_element(By.ID, "preview").is_displayed()
    if SHOT:
        explain(browser)
        browser.save_screenshot(SHOT)
    assert complaints(browser) == []
    assert "cell.png" not in running.access_log


def explain(browser: WebDriver) -> None:
    browser.find_element(By.ID, "explain").click()
    wait_until_shown(browser, "overlay")
    overlay = browser.find_element(By.ID, "overlay")
    assert int(str(overlay.get_property("naturalWidth"))) >= 224
    assert text(browser, "label") in text(browser, "overlay-caption")


# Another server: with the demo's inputs a picture takes long.
def test_a_cell_is_explained(
    browser: WebDriver, running: RunningEdge, quick: RunningServer
) -> None:
    running.change(f"--upstream=127.0.0.1:{quick.port}")
    try:
        choose(browser, CELL)
        wait_until_shown(browser, "answer")
        explain(browser)
        assert complaints(browser) == []
        assert wait_for(lambda: '"path":"/explanations/mambamic"' in running.access_log, 10)
        assert "cell.png" not in running.access_log
    finally:
        running.change(*running.arguments)


def test_a_file_is_dropped(browser: WebDriver) -> None:
    # A drag from outside the browser cannot be driven; the event is the one that it would send.
    browser.execute_async_script(
        """
        const done = arguments[1];
        const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
        document.body.dispatchEvent(
          new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
        done();
        """,
        base64.b64encode(CELL.read_bytes()).decode(),
    )
    wait_until_shown(browser, "answer")
    assert text(browser, "label") == "neutrophil"


def test_errors_are_said_in_words(browser: WebDriver, tmp_path: Path) -> None:
    wrong = tmp_path / "notes.png"
    wrong.write_text("no image at all", encoding="utf-8")
    choose(browser, wrong)
    wait_until_shown(browser, "failure")
    assert text(browser, "failure").startswith("The image was not classified: ")
    assert not browser.find_element(By.ID, "answer").is_displayed()

    noise = Image.frombytes("RGB", (800, 800), os.urandom(3 * 800 * 800))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    large = tmp_path / "large.png"
    large.write_bytes(buffer.getvalue())
    choose(browser, large)
    WebDriverWait(browser, PATIENCE).until(lambda _: "too large" in text(browser, "failure"))
    assert "1 MiB" in text(browser, "failure")

    # And then a good one.
    choose(browser, CELL)
    wait_until_shown(browser, "answer")
    assert not browser.find_element(By.ID, "failure").is_displayed()
    assert complaints(browser) == []


def test_by_keyboard_with_a_token(
    browser: WebDriver, running: RunningEdge, folder: Path, quick: RunningServer
) -> None:
    tokens = folder / "tokens"
    tokens.write_text("a-token-of-the-lab\n", encoding="utf-8")
    running.change(f"--upstream=127.0.0.1:{quick.port}", "--tokens", str(tokens))
    try:
        browser.refresh()
        browser.switch_to.active_element.send_keys(Keys.TAB)
        assert browser.switch_to.active_element.get_attribute("id") == "file"
        choose(browser, CELL)
        wait_until_shown(browser, "token")
        assert "token" in text(browser, "failure")
        browser.switch_to.active_element.send_keys("a-wrong-token-of-some-lab", Keys.ENTER)
        WebDriverWait(browser, PATIENCE).until(lambda _: "not known" in text(browser, "failure"))
        browser.switch_to.active_element.send_keys(Keys.CONTROL, "a")
        browser.switch_to.active_element.send_keys("a-token-of-the-lab", Keys.ENTER)
        wait_until_shown(browser, "answer")
        assert browser.switch_to.active_element.get_attribute("id") == "explain"
        browser.switch_to.active_element.send_keys(Keys.ENTER)
        wait_until_shown(browser, "overlay")
    finally:
        running.change(*running.arguments)


def test_nothing_comes_from_elsewhere(running: RunningEdge) -> None:
    reply = running.ask("GET", "/")
    policy = reply.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for path in (ROOT / "deploy" / "page").iterdir():
        served = running.ask("GET", f"/{path.name}")
        assert served.data == path.read_bytes()
        assert b"://" not in served.data.replace(b'xmlns="http://www.w3.org/2000/svg"', b"")
