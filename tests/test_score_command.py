from __future__ import annotations

from pathlib import Path

import pytest

from mambamic.cli import main

from .slide_runs import score


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["score", "--help"])
    assert left.value.code == 0
    assert "mambamic score slides/ --model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.svs"], "required: --out"),
        (["a.svs", "--out", "x", "--mpp", "0"], "above 0"),
        (["a.svs", "--out", "x", "--max-bad-tiles", "fine"], "a share such as 5%"),
        (["a.svs", "--out", "x", "--min-tissue", "101%"], "a share such as 5%"),
        (["a.svs", "--out", "x", "--tile", "0"], "at least 1"),
    ],
)
def test_a_wrong_call_says_what_is_right(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["score", *arguments])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no model"),
        (["--model", "nowhere"], "nowhere"),
        (
            ["--model", "CHECKPOINT", "--tile-px", "--tissue", "nowhere.png"],
            "--tissue 'nowhere.png'",
        ),
        (["--model", "CHECKPOINT", "--tile-px", "--target-mpp", "1"], "--tile-px and --target-mpp"),
        (["--model", "CHECKPOINT", "--tile-px", "--head", "softmax"], "states its own"),
    ],
)
def test_what_is_found_later_is_said_in_one_line(
    arguments: list[str],
    said: str,
    random_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a.svs").write_bytes(b"")
    given = [str(random_checkpoint) if word == "CHECKPOINT" else word for word in arguments]
    out = tmp_path / "out"
    assert main(["score", str(tmp_path / "a.svs"), "--out", str(out), *given]) in (1, 2)
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_an_output_that_is_a_file_is_refused(random_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_bytes(b"")
    (tmp_path / "out").write_text("")
    done = score(
        tmp_path / "a.svs", "--model", random_checkpoint, "--tile-px", "--out", tmp_path / "out"
    )
    assert done.returncode == 2
    assert "--out" in done.stderr


def test_a_run_that_is_stopped_says_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mambamic.slides.call.score_slides", stopped)
    assert main(["score", "a.svs", "--out", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
