"""A run on a Ray cluster of two nodes, in a namespace without any network but its own loopback."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ..slide_files import blobs, write_slide
from ..slide_runs import only, score, table

SCRIPT = Path(__file__).with_name("ray_cluster.py")
ROOT = SCRIPT.parent.parent.parent


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> list[Path]:
    path = tmp_path_factory.mktemp("slide") / "disc.tiff"
    write_slide(path, (4096, 4096), 3, blobs([(1500, 2000, 700)]))
    return [path, data_dir / "slides" / "CMU-1-Small-Region.corrupt.svs"]


@pytest.fixture(scope="module")
def arguments(slides: list[Path], random_checkpoint: Path) -> list[str]:
    more = [
        "--tile-px",
        "--tile",
        "128",
        "--embeddings",
        "--max-bad-tiles",
        "20%",
        "--device",
        "cpu",
    ]
    return [*map(str, slides), "--model", str(random_checkpoint), *more]


@pytest.fixture(scope="module")
def here(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("here")
    done = score(*arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(
    "kill",
    ["reader,model", *(pytest.param(kill, marks=pytest.mark.soak) for kill in ("", "model"))],
)
def test_a_cluster_gives_the_same_table(
    kill: str, here: Path, arguments: list[str], tmp_path: Path
) -> None:
    # A short path: the names of sockets in it are limited.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        namespace = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"]
        namespace += ["--mount-proc", sys.executable, str(SCRIPT), folder, kill]
        done = subprocess.run(
            [*namespace, *arguments, "--out", str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
            cwd=ROOT,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    for stem in ("disc", "CMU"):
        there = table(only(tmp_path, stem))
        assert there.equals(table(only(here, stem)))
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["model"]["in_use"]["models"] == 2
    assert record["tiles_scored_by_this_run"] == sum(
        json.loads((only(here, stem) / "summary.json").read_text())["tiles"]
        for stem in ("disc", "CMU")
    )
