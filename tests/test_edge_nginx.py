from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mambamic.edge import nginx
from mambamic.edge.settings import EdgeSettings, Upstream
from mambamic.errors import ServerError

SETTINGS = EdgeSettings((Upstream("127.0.0.1", 8080), Upstream("127.0.0.1", 8090)), port=18399)


def fake_nginx(folder: Path, version: str) -> None:
    path = folder / "nginx"
    path.write_text(f"#!/bin/sh\necho 'nginx version: {version}' >&2\n", encoding="utf-8")
    path.chmod(0o755)


def test_nginx_has_to_be_there_and_new_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = nginx.find_nginx()
    assert found.name == "nginx"
    monkeypatch.setenv("PATH", str(tmp_path))
    # Also where only root looks.
    assert nginx.find_nginx() == found
    fake_nginx(tmp_path, "nginx/1.18.0")
    with pytest.raises(ServerError, match=r"nginx/1\.18\.0.*expected nginx 1\.20"):
        nginx.find_nginx()
    fake_nginx(tmp_path, "nginx/1.29.3 (Ubuntu)")
    assert nginx.find_nginx() == tmp_path / "nginx"
    fake_nginx(tmp_path, "something else")
    with pytest.raises(ServerError, match="something else"):
        nginx.find_nginx()
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    with pytest.raises(ServerError, match="nginx-light"):
        nginx.find_nginx()


def test_what_is_written_is_good_for_nginx(tmp_path: Path) -> None:
    folder = tmp_path / "edge"
    nginx.write(replace(SETTINGS, tokens=("0123456789abcdef",)), folder)
    command = nginx.EdgeFolder(folder).command(nginx.find_nginx(), *nginx.as_this_user(), "-t")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr
    assert (folder / "page" / "index.html").is_file()
    assert (folder / "tokens.conf").stat().st_mode & 0o077 == 0
    assert folder.stat().st_mode & 0o077 == 0


def test_settings_that_nginx_refuses_leave_the_old_ones(tmp_path: Path) -> None:
    folder = nginx.EdgeFolder(tmp_path / "edge")
    nginx.prepare(SETTINGS, folder, nginx.find_nginx())
    before = (folder.root / "listen.conf").read_bytes()
    pem = tmp_path / "broken.pem"
    pem.write_text("no certificate", encoding="utf-8")
    with pytest.raises(ServerError, match="nginx refuses"):
        nginx.prepare(replace(SETTINGS, certificate=pem, key=pem), folder, nginx.find_nginx())
    assert (folder.root / "listen.conf").read_bytes() == before
    assert not (folder.root / "trial").exists()


def test_no_edge_and_another_process_of_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAMBAMIC_STATE", str(tmp_path))
    folder = nginx.EdgeFolder.of_port(18399)
    assert folder.root == tmp_path / "edge-18399"
    assert folder.master() is None
    folder.root.mkdir()
    (folder.root / "nginx.pid").write_text("1\n", encoding="ascii")
    assert folder.master() is None
    assert not nginx.stop(18399, print)
