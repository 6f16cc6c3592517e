from __future__ import annotations

from pathlib import Path

import pytest

from mambamic.errors import UsageError
from mambamic.slides.inputs import find_inputs

from .slide_files import blobs, write_slide
from .slide_runs import score


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.svs", "deep/b.tiff", "deep/a.svs", "deep/preview.png", ".hidden.svs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_a_folder_is_searched_and_previews_beside_slides_are_left_out(folder: Path) -> None:
    found, _ = find_inputs([str(folder)])
    assert [entry.path.relative_to(folder).as_posix() for entry in found] == [
        "a.svs",
        "deep/a.svs",
        "deep/b.tiff",
    ]
    assert found[2].name == "b.tiff"
    assert found[0].name != found[1].name, "two of one name are told apart"


def test_images_alone_are_slides(folder: Path) -> None:
    (folder / "only").mkdir()
    (folder / "only" / "x.png").write_bytes(b"")
    assert [entry.name for entry in find_inputs([str(folder / "only")])[0]] == ["x.png"]


def test_patterns_and_doubles(folder: Path) -> None:
    found, left_out = find_inputs(
        [str(folder / "deep" / "*.svs"), str(folder / "deep"), str(folder / "a.svs")]
    )
    assert len(found) == 3
    assert left_out == [], "nothing is lost"


def test_a_zip_is_a_set_of_tiles_and_a_folder_where_asked(folder: Path) -> None:
    (folder / "t.zip").write_bytes(b"")
    assert find_inputs([str(folder / "t.zip")])[0][0].tiles
    ((only,), _) = find_inputs([str(folder / "deep")], tiles=True)
    assert only.tiles
    assert only.path == folder / "deep"


def test_a_manifest_states_mpp_mask_and_id(folder: Path) -> None:
    table = folder / "slides.csv"
    table.write_text(
        "path,mpp,mask,id,donor\na.svs,0.25,deep/preview.png,first,7\ndeep/b.tiff,,,,8\n"
    )
    (first, second), _ = find_inputs([str(folder / "a.svs")], table)
    assert (first.name, first.mpp, first.mask) == ("first", 0.25, folder / "deep/preview.png")
    assert (second.name, second.mpp, second.mask) == ("b.tiff", None, None)
    assert find_inputs([str(table)]) == ([first, second], [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file\na.svs\n", "path, and where known"),
        ("path,mpp\na.svs,fine\n", "line 2: mpp 'fine'"),
        ("path\nnone.svs\n", "line 2: path 'none.svs'"),
        ("path,id\na.svs,x\ndeep/b.tiff,x\n", "line 2: the id 'x'"),
        ("path,mpp\n,0.5\n", "line 2: no path"),
    ],
)
def test_a_wrong_manifest_is_refused_with_its_line(folder: Path, text: str, said: str) -> None:
    (folder / "slides.csv").write_text(text)
    with pytest.raises(UsageError, match=said):
        find_inputs([], folder / "slides.csv")


@pytest.mark.parametrize("named", [[], ["nowhere.svs"], ["no*.svs"], ["slides/**.svs"]])
def test_nothing_to_score_is_an_error(named: list[str]) -> None:
    with pytest.raises(UsageError):
        find_inputs(named)


def test_a_manifest_wins_over_a_bare_path_in_whichever_order(folder: Path) -> None:
    (folder / "slides.csv").write_text("path,id\na.svs,first\n")
    named = [str(folder / "slides.csv"), str(folder)]
    for order in (named, named[::-1]):
        found, left_out = find_inputs(order)
        assert sorted(entry.name for entry in found) == ["a.svs", "b.tiff", "first"]
        assert left_out == []


def test_one_slide_with_two_masks_is_two_inputs(folder: Path) -> None:
    table = folder / "slides.csv"
    rows = "path,id,mask,mpp\na.svs,one,deep/preview.png,\na.svs,two,,\na.svs,three,,0.5\n"
    table.write_text(rows + "a.svs,four,,0.5\n")
    found, (left_out,) = find_inputs([str(table)])
    assert [entry.name for entry in found] == ["one", "two", "three"]
    assert left_out == "four: left out, it is three with the same mask and mpp"
    table.write_text("path,mpp\na.svs,0.5\na.svs,0.25\n")
    with pytest.raises(UsageError, match="add a column id"):
        find_inputs([str(table)])


def test_results_that_lie_among_the_slides_are_not_scored(folder: Path) -> None:
    """Neither those that are done, nor those of a run that was killed while it planned."""
    before, _ = find_inputs([str(folder)])
    for name, mark in (("one-12345678", "job.json"), ("two-12345678", ".locks/plan")):
        results = folder / "scores" / name
        (results / mark).parent.mkdir(parents=True)
        (results / mark).write_bytes(b"")
        for picture in ("overview.jpg", "heatmap.tif"):
            (results / picture).write_bytes(b"")
    assert find_inputs([str(folder)])[0] == before
    assert find_inputs([str(folder / "*" / "*" / "*"), str(folder)])[0] == before
    shell = [str(path) for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    assert len(find_inputs(shell)[0]) == len(before)
    assert find_inputs([str(folder / "[!.]*")])[0] == find_inputs(shell)[0]
    with pytest.raises(UsageError, match="no slides"):
        find_inputs([str(folder / "scores")])


def test_what_is_left_out_is_said(random_checkpoint: Path, tmp_path: Path) -> None:
    first, copy = (tmp_path / folder / "s.tiff" for folder in "ab")
    for path in (first, copy):
        path.parent.mkdir()
        write_slide(path, (512, 512), 1, blobs([(250, 250, 100)]))
    planned = score(tmp_path, "--model", random_checkpoint, "--out", "x", "--tile-px", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert planned.stderr.splitlines() == [f"{copy}: left out, it is a copy of {first}"]
