"""What is made of pip-audit's findings; whether its data can be reached is not for a test."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def script(root: Path) -> dict[str, Any]:
    return runpy.run_path(str(root / ".ci" / "audit.py"))


def test_a_hole_is_named(script: dict[str, Any]) -> None:
    hole = {"id": "PYSEC-1", "fix_versions": ["1.1", "2.0"]}
    said, well = script["lines"](
        [
            {"name": "a", "version": "1.0", "vulns": [hole]},
            {"name": "b", "version": "2.0", "vulns": []},
            {"name": "c", "skip_reason": "not found"},
        ]
    )
    assert not well
    assert said == [
        "pip-audit: a 1.0: PYSEC-1, mended in 1.1, 2.0",
        "pip-audit: 1 known holes in 2 of 3 packages",
    ]
    assert script["lines"]([{"name": "b", "version": "2.0", "vulns": []}])[1]


def test_nothing_looked_up_is_one_line_and_no_failure(script: dict[str, Any]) -> None:
    assert script["audit"](timeout=0.01) is None
    (said,), well = script["lines"](None)
    assert "nothing was audited" in said
    assert not well


def test_packages_that_were_skipped_are_not_well(
    script: dict[str, Any], tmp_path: Path, root: Path
) -> None:
    """As an index without data on holes makes it: all skipped, and a good end."""
    tool = tmp_path / "pip-audit"
    tool.write_text('#!/bin/sh\necho \'{"dependencies": [{"name": "a", "skip_reason": "?"}]}\'\n')
    tool.chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    for arguments, status in (([], 0), (["--strict"], 1)):
        done = subprocess.run(
            [tmp_path / "python", root / ".ci" / "audit.py", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (status, "")
        assert done.stdout == f"pip-audit: {script['UNREACHED']}\n"
