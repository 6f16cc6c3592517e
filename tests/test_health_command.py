from __future__ import annotations

from pathlib import Path

import pytest

from mambamic.cli import main


def test_one_question_has_to_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--ready", "--live"]):
        with pytest.raises(SystemExit, match="2"):
            main(["health", *arguments])
    assert "--ready" in capsys.readouterr().err
    assert main(["health", "--live", "--timeout", "0"]) == 2
    assert "--timeout 0" in capsys.readouterr().err


def test_no_server(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MAMBAMIC_STATE", str(tmp_path))
    for question in ("--ready", "--live"):
        assert main(["health", question]) == 1
        assert "no server runs on port 8080" in capsys.readouterr().err
