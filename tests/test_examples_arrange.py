"""The script that arranges data sets, and the commands that the documentation gives for it."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from mambamic.data.check import check


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "examples"))
    return importlib.import_module("arrange")


def save(path: Path, colour: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (colour % 256, colour // 256, 7)).save(path)


def arranged(out: Path) -> dict[str, set[str]]:
    """Names by split and class."""
    found: dict[str, set[str]] = {}
    for path in out.glob("*/*/*"):
        found.setdefault(path.parent.relative_to(out).as_posix(), set()).add(path.name)
    return found


def test_folders_of_classes(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(240):
        label = ("Parasitized", "Uninfected")[index % 2]
        patient = f"C{index // 2 % 40}P"
        save(tmp_path / f"cell_images/{label}/{patient}_cell_{index}.png", index)
    (tmp_path / "cell_images/Uninfected/Thumbs.db").write_bytes(b"x")
    out = tmp_path / "malaria"
    script.main([str(tmp_path / "cell_images"), str(out), "--group-pattern", "^[^_]+"])
    found = arranged(out)
    assert sum(map(len, found.values())) == 240
    # Every patient, of both classes, in one split.
    homes: dict[str, set[str]] = {}
    for place, names in found.items():
        for name in names:
            homes.setdefault(name.partition("_")[0], set()).add(place.partition("/")[0])
    assert len(homes) == 40
    assert all(len(splits) == 1 for splits in homes.values())
    assert {place.partition("/")[0] for place in found} == {"train", "val", "test"}
    assert len(found["train/Parasitized"]) > 2 * len(found["test/Parasitized"])
    assert check(out, progress=False)["problems"] == []
    assert f"test/Uninfected: {len(found['test/Uninfected'])}\n" in capsys.readouterr().out
    again = tmp_path / "again"
    script.main([str(tmp_path / "cell_images"), str(again), "--group-pattern", "^[^_]+", "--copy"])
    assert arranged(again) == found
    assert not any(path.is_symlink() for path in again.rglob("*"))


def test_a_table_with_splits(script: ModuleType, tmp_path: Path) -> None:
    rows = ["Image Name,Majority Vote Label,Partition"]
    for index in range(60):
        save(tmp_path / f"images/MHIST_{index:02}.png", index)
        rows.append(
            f"MHIST_{index:02}.png,{('HP', 'SSA')[index % 2]},{'test' if index > 39 else 'train'}"
        )
    (tmp_path / "annotations.csv").write_text("\n".join(rows))
    out = tmp_path / "mhist"
    script.main([
        str(tmp_path / "images"), str(out), "--table", str(tmp_path / "annotations.csv"),
        "--image", "Image Name", "--label", "Majority Vote Label", "--split", "Partition",
    ])  # fmt: skip
    found = arranged(out)
    assert found["test/HP"] == {f"MHIST_{index}.png" for index in range(40, 60, 2)}
    assert sum(len(found[f"{split}/HP"]) for split in ("train", "val")) == 20
    assert len(found["train/HP"] | found["train/SSA"]) > len(found["val/HP"] | found["val/SSA"])


def test_a_table_in_another_dialect(script: ModuleType, tmp_path: Path) -> None:
    rows = ["\ufeffImage_name;Plane;Patient_num;Train "]
    for index in range(30):
        save(tmp_path / f"Images/Patient{index}.png", index)
        plane = ("Fetal brain", "Fetal/abdomen")[index % 2]
        rows.append(f"Patient{index};{plane};{index // 3};{int(index < 20)}")
    (tmp_path / "data.csv").write_text("\n".join(rows), encoding="utf-8")
    out = tmp_path / "planes"
    script.main([
        str(tmp_path / "Images"), str(out), "--table", str(tmp_path / "data.csv"),
        "--delimiter", ";", "--image", "Image_name", "--label", "Plane",
        "--group", "Patient_num", "--split", "Train",
    ])  # fmt: skip
    found = arranged(out)
    assert len(found["test/Fetal brain"]) == len(found["test/Fetal-abdomen"]) == 5
    assert sum(map(len, found.values())) == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--label": "Class"}, "has no column 'Class' but name, label, split"),
        ({"--split": "split"}, "split 'maybe' of 'x.png'; expected one of train, "),
        ({"--image": "label"}, "'a' in .* is not below"),
    ],
)
def test_tables_that_do_not_fit(
    changes: dict[str, str], message: str, script: ModuleType, tmp_path: Path
) -> None:
    save(tmp_path / "images/x.png", 1)
    (tmp_path / "t.csv").write_text("name,label,split\nx.png,a,maybe\n")
    options = {"--table": str(tmp_path / "t.csv"), "--image": "name", "--label": "label"} | changes
    argv = [text for pair in options.items() for text in pair]
    with pytest.raises(SystemExit, match=message):
        script.main([str(tmp_path / "images"), str(tmp_path / "out"), *argv])


def test_a_folder_that_is_not_new(script: ModuleType, tmp_path: Path) -> None:
    save(tmp_path / "images/a/x.png", 1)
    call = [str(tmp_path / "images"), str(tmp_path / "out")]
    script.main(call)
    with pytest.raises(SystemExit, match="is not new"):
        script.main(call)
    with pytest.raises(SystemExit, match="there are no images below"):
        script.main([str(tmp_path / "nowhere"), str(tmp_path / "other")])


def test_the_commands_in_the_documentation_are_understood(script: ModuleType, root: Path) -> None:
    text = (root / "docs/datasets.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^python examples/arrange\.py (.*)$", text, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        args = script.parser().parse_args(shlex.split(command))
        assert args.table is None or (args.image and args.label), command
