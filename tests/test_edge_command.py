from __future__ import annotations

from pathlib import Path

import pytest

from mambamic.cli import main


def test_a_folder_for_a_container(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "edge"
    arguments = ["--upstream", "server:8080", "--host", "0.0.0.0", "--in-flight", "7"]
    assert main(["edge", "--write", str(folder), "--foreground", *arguments]) == 0
    assert f"nginx -p {folder}/ -c {folder}/nginx.conf" in capsys.readouterr().out
    written = (folder / "settings.conf").read_text(encoding="utf-8")
    assert "server server:8080 max_fails=0 max_conns=7;" in written
    assert "access_log /dev/stdout edge;" in written
    assert "listen 0.0.0.0:8000;" in (folder / "listen.conf").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--upstream", "8080"], "--upstream 8080"),
        (["--tokens", "nowhere"], "--tokens nowhere"),
        (["--in-flight", "0"], "--in-flight 0"),
        (["--certificate", "a.pem"], "--key"),
    ],
)
def test_a_wrong_call(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edge", *arguments]) == 2
    assert said in capsys.readouterr().err
