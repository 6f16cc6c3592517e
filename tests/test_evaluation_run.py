"""``mambamic evaluate`` from end to end, on real cells and with calls that cannot work."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import zipfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics as sk

from mambamic import Classifier, create_model
from mambamic.checkpoint import load_checkpoint, save_checkpoint
from mambamic.cli import main
from mambamic.config import Config
from mambamic.evaluation.run import FILES

EACH = 10  # cells per class
_VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """A page's tags and text; whether they are nested as they should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in _VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action"):
                self.sources.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@dataclass(frozen=True)
class Evaluated:
    """An evaluation that has ended: of what, where, and what it printed."""

    demo: Path
    out: Path
    shown: str


@pytest.fixture(scope="session")
def cells(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few validation cells of each class, as val, and some of these again as extra."""
    folder = tmp_path_factory.mktemp("cells")
    with zipfile.ZipFile(data_dir / "pbc200" / "val.zip") as archive:
        by_class: dict[str, list[str]] = {}
        for name in sorted(archive.namelist()):
            by_class.setdefault(name.split("/")[1], []).append(name)
        for names in by_class.values():
            # The classes' ends: the demo checkpoint is wrong on some of these.
            for name in names[-EACH:]:
                archive.extract(name, folder)
            for name in names[-4:]:
                target = folder / "extra" / Path(name).relative_to("val")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / name, target)
    return folder


@pytest.fixture(scope="module")
def evaluated(root: Path, cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """The demo checkpoint on the real cells."""
    demo = root / "model_store/mambamic_t_pbc"
    out = tmp_path_factory.mktemp("evaluated") / "new/out"
    call = ["evaluate", str(demo), str(cells), "--split", "val", "--out", str(out)]
    with redirect_stdout(io.StringIO()) as shown:
        assert main([*call, "--device", "cpu", "--bootstrap", "200", "--batch-size", "7"]) == 0
    return Evaluated(demo, out, shown.getvalue())


@pytest.fixture
def demo(root: Path, tmp_path: Path) -> Path:
    """The demo checkpoint as training left it: without a temperature."""
    copy = Path(shutil.copytree(root / "model_store/mambamic_t_pbc", tmp_path / "demo"))
    config = copy / "config.json"
    stated = json.loads(config.read_text(encoding="utf-8")) | {"temperature": None}
    config.write_text(json.dumps(stated), encoding="utf-8")
    return copy


def write_images(folder: Path, split: str, classes: tuple[str, ...], each: int = 2) -> Path:
    generator = np.random.default_rng(len(classes))
    for name in classes:
        (folder / split / name).mkdir(parents=True)
        for index in range(each):
            pixels = generator.integers(0, 255, (20, 20, 3), np.uint8)
            Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


def write_ranked(folder: Path, checkpoint: Path, ranks: list[int]) -> Path:
    """Write val of images whose class is that which the model puts at a rank, 0 the first."""
    classifier = Classifier.load(checkpoint, device="cpu")
    generator = np.random.default_rng(0)
    for index, rank in enumerate(ranks):
        image = Image.fromarray(generator.integers(0, 255, (20, 20, 3), np.uint8))
        probabilities = classifier.predict([image])[0].probabilities
        name = sorted(probabilities, key=lambda name: -probabilities[name])[rank]
        (folder / "val" / name).mkdir(parents=True, exist_ok=True)
        image.save(folder / "val" / name / f"{index}.png")
    return folder


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_real_cells(evaluated: Evaluated, cells: Path) -> None:
    demo, out = evaluated.demo, evaluated.out
    assert {path.name for path in out.iterdir()} == set(FILES)
    assert [path.name for path in out.parent.iterdir()] == ["out"]

    results = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    config = load_checkpoint(demo).config
    rows = rows_of(out)
    assert len(rows) == results["images"] == 8 * EACH
    truth = [row["true"] for row in rows]
    assert [row["image"].split("/")[1] for row in rows] == truth
    scores = np.array([[float(row[f"probability_{name}"]) for name in config.classes]
                       for row in rows])  # fmt: skip
    overall = {name: metric["value"] for name, metric in results["overall"].items()}
    top = [row["predicted"] for row in rows]
    assert overall["accuracy"] == pytest.approx(sk.accuracy_score(truth, top), abs=1e-6)
    assert overall["f1"] == pytest.approx(sk.f1_score(truth, top, average="macro"), abs=1e-6)
    normed = scores / scores.sum(1, keepdims=True)
    auc = sk.roc_auc_score(truth, normed, multi_class="ovr", labels=list(config.classes))
    assert overall["auc"] == pytest.approx(auc, abs=1e-6)
    assert overall["accuracy"] > 0.9
    assert (
        results["confusion"]["counts"]
        == sk.confusion_matrix(truth, top, labels=list(config.classes)).tolist()
    )

    first = Image.open(cells / rows[0]["image"])
    expected = Classifier.load(demo, device="cpu").predict([first])[0].probabilities
    assert scores[0] == pytest.approx([expected[name] for name in config.classes], abs=1e-5)

    assert results["run"]["weights_sha256"] == config.weights_sha256
    assert results["run"]["command"].startswith(f"mambamic evaluate {demo} {cells} --out {out}")
    assert results["intervals"] == {"level": 0.95, "resamples": 200, "seed": 0}
    assert results["calibration"] is None
    shown = evaluated.shown
    assert f"accuracy           {overall['accuracy']:.5f} (" in shown
    assert shown.endswith(f"{out / 'report.html'}\n")


def test_the_page(evaluated: Evaluated) -> None:
    out = evaluated.out
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert all(source.startswith("data:image/") for source in page.sources)
    assert not re.search(r"https?:|url\(|@import|<script|<link", text)
    results = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    mistakes = sum(row["true"] != row["predicted"] for row in rows_of(out))
    assert mistakes > 0
    assert page.tags.count("figure") == mistakes
    assert len(page.sources) == 3 + mistakes
    for name in results["classes"]:
        assert name in page.text
    for expected in (results["run"]["weights_sha256"], results["run"]["command"], "torchmetrics"):
        assert expected in page.text
    assert f"{100 * results['overall']['accuracy']['value']:.2f} %" in page.text


def test_calibration(demo: Path, cells: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    plain = load_checkpoint(demo).config
    common = ["--split", "extra", "--bootstrap", "20", "--device", "cpu", "--out"]
    assert main(["evaluate", str(demo), str(cells), "--calibrate", *common, str(out)]) == 0
    results = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    fitted = results["calibration"]
    assert plain.temperature is None
    assert fitted["temperature_before"] == 1
    assert fitted["fitted_on"] == "val"
    assert fitted["images"] == 8 * EACH
    # Label smoothing made it less sure than it can be.
    assert 0.3 < fitted["temperature"] < 0.9
    assert load_checkpoint(demo).config.temperature == fitted["temperature"]
    assert results["overall"]["nll"]["value"] < fitted["before"]["nll"]["value"]
    assert results["overall"]["accuracy"] == fitted["before"]["accuracy"]
    assert "Temperature" in (out / "report.html").read_text(encoding="utf-8")

    # From here on the classifier does it by itself.
    assert main(["evaluate", str(demo), str(cells), *common, str(again)]) == 0
    later = json.loads((again / "metrics.json").read_text(encoding="utf-8"))
    assert later["run"]["temperature"] == fitted["temperature"]
    for name, metric in later["overall"].items():
        assert metric["value"] == pytest.approx(results["overall"][name]["value"], abs=1e-5), name
    for old, new in zip(rows_of(out), rows_of(again), strict=True):
        assert float(old["probability_ig"]) == pytest.approx(float(new["probability_ig"]), abs=1e-5)


def test_calibrating_on_what_is_evaluated_is_said(
    random_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(random_checkpoint, tmp_path / "copy")
    # Every fourth is of another class than the model says: there is something to fit.
    data = write_ranked(tmp_path / "data", copy, [1, 0, 0, 0] * 3)
    out = tmp_path / "out"
    call = ["evaluate", str(copy), str(data), "--split", "val", "--calibrate", "--out", str(out)]
    status = main([*call, "--bootstrap", "5"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert "fitted on these very images" in captured.out


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_two_classes_with_odd_names(head: str, tmp_path: Path) -> None:
    """Names from users are text on the page, whatever they hold; one class is absent."""
    classes = ("<b onclick=alert(1)>", "a & b", '$x$, "y"')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = create_model("medmamba_t", 3).state_dict()
    config = Config("medmamba_t", classes, input_size=32, head=head)
    save_checkpoint(tmp_path / "model", config, weights, "# None\n")
    data = write_images(tmp_path / "data", "test", classes[:2], each=6)
    out = tmp_path / "out"
    call = ["evaluate", str(tmp_path / "model"), str(data), "--out", str(out)]
    assert main([*call, "--bootstrap", "10", "--device", "cpu"]) == 0
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert "<b onclick" not in text
    assert classes[0] in page.text
    results = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert results["kind"] == ("multi-class" if head == "softmax" else "multi-label")
    assert list(results["classes"]) == list(classes)
    assert results["classes"][classes[2]]["auc"]["value"] is None
    assert "–" in page.text
    assert len(rows_of(out)) == 12


def test_several_labels_per_image(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, (12, 3)).astype(np.uint8)
    images = generator.integers(0, 255, (12, 28, 28), np.uint8)
    np.savez(tmp_path / "data.npz", test_images=images, test_labels=labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = create_model("medmamba_t", 3).state_dict()
    for head, status in (("sigmoid", 0), ("softmax", 1)):
        config = Config("medmamba_t", ("x", "y", "z"), input_size=32, head=head)
        save_checkpoint(tmp_path / head, config, weights, "# None\n")
        out = tmp_path / f"out_{head}"
        call = ["evaluate", str(tmp_path / head), str(tmp_path / "data.npz"), "--out", str(out)]
        assert main([*call, "--bootstrap", "10"]) == status
        assert out.exists() == (status == 0)
    results = json.loads((tmp_path / "out_sigmoid/metrics.json").read_text())
    assert results["kind"] == "multi-label"
    rows = rows_of(tmp_path / "out_sigmoid")
    truth = [[name in row["true"].split("|") for name in "xyz"] for row in rows]
    assert truth == labels.astype(bool).tolist()
    found = [[name in row["predicted"].split("|") for name in "xyz"] for row in rows]
    exact = sk.accuracy_score(labels, np.array(found, int))
    assert results["overall"]["exact_match"]["value"] == pytest.approx(exact, abs=1e-6)


def fails(call: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = main(["evaluate", *call])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return status, captured.err


def test_bad_data(
    random_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write_images(data, "test", ("a", "b", "other"))
    write_images(data, "broken", ("a", "b"))
    (data / "broken/a/bad.png").write_bytes(b"no image")
    (data / "empty/a").mkdir(parents=True)
    call = [str(random_checkpoint), str(data), "--out", str(out)]
    for split, expected in (
        ("test", r"classes other; expected none but a, b, c"),
        ("broken", r"1 of 5 images of split 'broken' cannot be read \(broken/a/bad\.png: "),
        ("empty", r"has 0 images .* in split 'empty'"),
        ("val", r"has neither val/ nor val\.zip"),
    ):
        status, error = fails([*call, "--split", split], capsys)
        assert status == 1
        assert re.search(expected, error), error
    assert not out.exists()
    status, error = fails([str(tmp_path), str(data), "--out", str(out)], capsys)
    assert (status, "config.json cannot be read" in error) == (1, True)


def test_a_folder_that_is_there_is_kept(
    random_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "data", "test", ("a", "b"))
    out = tmp_path / "out"
    call = [str(random_checkpoint), str(data), "--out", str(out), "--bootstrap", "5"]
    assert main(["evaluate", *call]) == 0
    capsys.readouterr()
    before = (out / "metrics.json").read_bytes()
    status, error = fails(call, capsys)
    assert (status, f"{out} exists" in error) == (2, True)
    assert (out / "metrics.json").read_bytes() == before
    assert main(["evaluate", *call, "--force", "--seed", "7"]) == 0
    assert json.loads((out / "metrics.json").read_text())["intervals"]["seed"] == 7
    capsys.readouterr()

    (out / "mine.txt").write_text("mine")
    status, error = fails([*call, "--force"], capsys)
    assert (status, "mine.txt is in the way of --force" in error) == (2, True)
    assert (out / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("split", "expected"),
    [("extra", "has neither extra/"), ("val", "no temperature fits 4 validation images with 4 ")],
)
def test_a_failure_leaves_nothing_behind(
    split: str,
    expected: str,
    random_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = shutil.copytree(random_checkpoint, tmp_path / "copy")
    before = (copy / "config.json").read_bytes()
    # What the model thinks least of is true: no temperature is high enough.
    data = write_ranked(tmp_path / "data", copy, [7] * 4)
    call = [str(copy), str(data), "--split", split, "--calibrate", "--out", str(tmp_path / "out")]
    status, error = fails(call, capsys)
    assert (status, expected in error) == (1, True), error
    assert (copy / "config.json").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "data"}


def test_wrong_calls(capsys: pytest.CaptureFixture[str]) -> None:
    for extra, expected in (
        (["--bootstrap", "0"], "a whole number of at least 1"),
        (["--seed", "-1"], "expected"),
        (["--batch-size", "x"], "a whole number of at least 1"),
    ):
        with pytest.raises(SystemExit) as status:
            main(["evaluate", "model", "data", "--out", "out", *extra])
        assert status.value.code == 2
        assert expected in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["evaluate", "--help"])
    assert status.value.code == 0
    out = capsys.readouterr().out
    assert "example:\n  mambamic evaluate " in out
    assert "exit status" in out
