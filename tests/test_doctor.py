from __future__ import annotations

import json

import pytest

from mambamic import doctor, kernels
from mambamic._version import __version__
from mambamic.cli import main


def test_the_report_is_json_and_names_each_backend() -> None:
    report = doctor.examine()
    assert json.loads(json.dumps(report)) == report
    assert report["mambamic"] == __version__
    compute = report["compute"]
    assert set(compute["backends"]) == set(kernels.status())
    for backend in compute["backends"].values():
        assert backend["detail"]
    assert compute["backends"][compute["backend"]]["available"]
    assert report["serving"]["java"]["release"] >= 17
    assert report["serving"]["problems"] == []


def test_the_text_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambamic.launcher.java.MINIMUM", 999)
    report = doctor.examine()
    report["compute"] = {"error": "no torch; run pip install 'mambamic[torch]'"}
    text = "\n".join(doctor.lines(report))
    assert "999 or newer" in text
    assert "mambamic[torch]" in text
    assert "ready" not in text


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"mambamic {__version__}" in text
    assert "auto uses" in text
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mambamic"] == __version__
