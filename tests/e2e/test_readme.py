"""What the README tells a user to type, typed, and its answers."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.table import PAGES, updated

from .servers import end_all, environment, free_port, of_state

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run(command: str, root: Path, state: Path) -> str:
    done = subprocess.run(
        shlex.split(command, comments=True),
        cwd=root, env=environment(state), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def test_the_first_screen(root: Path, state: Path) -> None:
    """``make serve`` prints the answer that the README shows, and so does its curl."""
    serve, test = blocks("bash")[0].splitlines()
    assert test.split()[:2] == ["make", "test"]  # this very run
    (curl,) = (line for block in blocks("bash") for line in block.splitlines() if "curl" in line)
    shown = json.loads(blocks("json")[0])
    port = free_port()
    # The interpreter that runs the tests has all that the installation would bring.
    make = f"make BIN={Path(sys.executable).parent} PORT={port} -o .venv/.serve"
    try:
        printed = run(serve.replace("make", make, 1), root, state)
        answers = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        answers.append(json.loads(run(curl.replace("8080", str(port)), root, state)))
        assert len(answers) == 2
        for answer in answers:
            assert answer.keys() == shown.keys()
            assert answer["label"] == shown["label"]
            assert answer["probabilities"] == pytest.approx(shown["probabilities"], abs=2e-3)
        run(f"{make} stop", root, state)
        assert not of_state(state)
    finally:
        end_all(state)


def test_the_commands_under_use(root: Path, state: Path) -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    commands = [line for line in lines if re.match(r"\.venv/bin/mambamic (predict|doctor)", line)]
    assert len(commands) == 2
    printed = [
        run(line.replace(".venv/bin/mambamic", f"{sys.executable} -m mambamic"), root, state)
        for line in commands
    ]
    assert "neutrophil" in printed[0]
    assert "auto uses" in printed[1]


def test_the_python_example(root: Path, state: Path) -> None:
    (example,) = blocks("python")
    printed = run(f"{sys.executable} -c {shlex.quote(example)}", root, state)
    assert printed.startswith("neutrophil 0.9")


@pytest.mark.parametrize("name", PAGES)
def test_the_table_is_what_the_benchmarks_printed(root: Path, name: str) -> None:
    page = (root / name).read_text()
    assert updated(page, PAGES[name]()) == page
