"""What users install, and the files around it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
import yaml

from mambamic._version import __version__
from setup import BuildScan, find_compiler

IMPORTED = ("mambamic", "kernels", "handlers", "export")


@pytest.fixture(scope="session")
def metadata(wheel: Path) -> Message:
    """What the wheel says about itself."""
    name = f"mambamic-{__version__}.dist-info/METADATA"
    return message_from_bytes(zipfile.ZipFile(wheel).read(name))


def test_wheel_serves_every_python_of_one_platform(wheel: Path) -> None:
    assert re.fullmatch(rf"mambamic-{re.escape(__version__)}-py3-none-linux_\w+\.whl", wheel.name)


def test_wheel_holds_every_module_and_nothing_else(wheel: Path, root: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    expected = {
        path.relative_to(root).as_posix()
        for path in (root / "mambamic").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    for folder in IMPORTED[1:]:
        expected |= {
            f"mambamic/{path.relative_to(root).as_posix()}"
            for path in (root / folder).rglob("*.py")
            if "__pycache__" not in path.parts
        }
    assert {name for name in names if name.endswith(".py")} == expected
    top = {name.split("/")[0] for name in names}
    assert top == {"mambamic", f"mambamic-{__version__}.dist-info"}
    assert "mambamic/py.typed" in names
    assert "mambamic/evaluation/report.html" in names
    assert "mambamic/edge/nginx.conf" in names
    page = {f"mambamic/edge/page/{path.name}" for path in (root / "deploy" / "page").iterdir()}
    assert len(page) >= 4
    assert page <= set(names)
    assert "mambamic/kernels/_scan2d.so" in names
    assert "mambamic/kernels/native/cuda/forward.cu" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_runs_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import mambamic.kernels.cpu as cpu; print(cpu.__file__, cpu.unavailable())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(tmp_path / "mambamic" / "kernels" / "cpu.py"), "None"]


def test_a_machine_without_compiler_asks_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_compiler() is None
    # A compiler without the C library's headers, as on a bare Debian, is not one.
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    assert find_compiler() is None
    broken.write_text("#!/bin/sh\nexit 0\n", encoding="utf-8")
    assert find_compiler() == ["cc"]
    monkeypatch.setenv("CC", "ccache gcc")
    assert find_compiler() == ["ccache", "gcc"]


def test_library_has_no_python_version_in_its_name() -> None:
    filename = BuildScan.get_ext_filename
    assert filename(BuildScan.__new__(BuildScan), "mambamic.kernels._scan2d") == str(
        Path("mambamic", "kernels", "_scan2d.so")
    )


def test_one_version_everywhere(root: Path, metadata: Message) -> None:
    assert metadata["Version"] == __version__
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    assert newest is not None
    assert newest[1] == __version__


def test_one_licence_everywhere(root: Path, metadata: Message) -> None:
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    assert metadata["License-Expression"] == citation["license"] == "Apache-2.0"
    assert "Apache License" in (root / "LICENSE").read_text(encoding="utf-8")


def test_links_in_the_readme_lead_somewhere(root: Path) -> None:
    text = (root / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    relative = [link.split("#")[0] for link in links if "://" not in link and link[0] != "#"]
    assert [link for link in relative if not (root / link).exists()] == []


def test_every_dependency_is_pinned(root: Path, metadata: Message) -> None:
    """What is asked for directly is in constraints.txt, except torch."""
    constraints = (root / "constraints.txt").read_text(encoding="utf-8")
    pinned = set(re.findall(r"^([\w.-]+)==", constraints, re.MULTILINE))
    asked = {
        re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")  # type: ignore[index]
        for requirement in metadata.get_all("Requires-Dist", [])
    }
    assert asked - {"mambamic", "torch"} - pinned == set()
    assert "torch" not in pinned


def test_make_help_lists_every_target(root: Path) -> None:
    listed = subprocess.run(["make", "help"], cwd=root, check=True, capture_output=True, text=True)
    for target in ("install", "serve", "stop", "test", "check", "soak", "help"):
        assert f"make {target} " in listed.stdout
    assert "MAMBAMIC_TORCH_INDEX" in listed.stdout


def test_nothing_built_or_heavy_is_tracked(root: Path) -> None:
    if not (root / ".git").exists():
        pytest.fail("the tests run in a clone: what is tracked cannot be listed here")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=root, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert [
        name for name in tracked if name.endswith((".so", ".mar", ".whl", ".pth", ".pkl"))
    ] == []
