"""A whole run, and what is set beside its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mambamic.benchmark import published, training
from mambamic.benchmark.report import lines
from mambamic.benchmark.suite import PARTS, Options, Suite, compare
from mambamic.benchmark.timing import Timing
from mambamic.errors import BackendError, CheckpointError

ONCE = Timing(warmup=1, repeats=2)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small operations: where cores are shared, threads wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from tests.random_checkpoint import write_random_checkpoint

    checkpoint = write_random_checkpoint(tmp_path_factory.mktemp("cells") / "cells")
    options = Options((str(checkpoint),), device="cpu", batches=(1, 3), training_batch=2,
                      timing=ONCE)  # fmt: skip
    return Suite(options).run()


def test_every_part_is_in_the_record(record: dict[str, Any]) -> None:
    assert json.loads(json.dumps(record)) == record
    assert [row["part"] for row in record["rows"]] == [
        "throughput",
        "throughput",
        "latency",
        "training",
        *["scan"] * 8,
    ]
    assert {row["part"] for row in record["rows"]} == set(PARTS)
    assert (record["warmup"], record["repeats"], record["statistic"]) == (1, 2, "median")
    assert set(record["rates_per_second"]) == {"float32"}
    assert record["failed"] == {}


def test_ratios_are_of_what_was_measured(record: dict[str, Any]) -> None:
    for row in record["rows"]:
        if row["part"] == "scan":
            for way in ("forward", "backward"):
                floor = max(row[f"{way}_floors_ms"].values())
                expected = row[f"{way}_ms"] / floor
                assert row[f"{way}_times_floor"] == pytest.approx(expected, rel=0.01)
            continue
        took = {"throughput": "ms_per_call", "latency": "p50_ms", "training": "ms_per_step"}
        expected = row[took[row["part"]]] / row["floor_ms"]
        assert row["times_floor"] == pytest.approx(expected, rel=0.01)


def test_nothing_published_stands_beside_another_device(record: dict[str, Any]) -> None:
    assert not published.compared(record["device"])
    assert not any("published" in row for row in record["rows"])
    assert "an H200" not in "\n".join(lines(record))


def test_the_table_on_the_screen(record: dict[str, Any]) -> None:
    text = lines(record)
    assert record["device"] in text[0]
    assert f"torch {torch.__version__}" in text[0]
    assert "medians of 2 runs after 1" in text[1]
    for row in record["rows"]:
        if row["part"] == "scan":
            shape = "(" + ", ".join(map(str, row["shape"])) + ")"
            for way in ("forward", "backward"):
                found = [line for line in text if f"scan {way} " in line and f" {shape} " in line]
                assert f"{row[way + '_ms']:.3f} ms" in found[0]
        elif row["part"] == "latency":
            assert any(f"{row['p50_ms']:.2f} ms, p99 {row['p99_ms']:.2f}" in line for line in text)
    for name, meaning in record["floors"].items():
        assert f"floor of {name}: {meaning}" in text
    assert "exponentials" not in "".join(text)


def test_the_published_figures_stand_at_the_best_batch() -> None:
    network = {"model": "mine", "architecture": "mambamic_t", "input_size": 224}
    scan = {"part": "scan", "shape": [128, 4, 768, 49], "forward_ms": 0.171}
    rows: list[dict[str, Any]] = [
        {"part": "throughput", **network, "images_per_second": 973.0},
        {"part": "throughput", **network, "images_per_second": 9730.0},
        {"part": "throughput", **network, "model": "small", "input_size": 64,
         "images_per_second": 1e5},
        {"part": "latency", **network, "p50_ms": 0.54},
        {"part": "training", **network, "images_per_second": 456.0},
        {**scan, "dtype": "float16"},
        {**scan, "dtype": "float32"},
        {**scan, "dtype": "float16", "shape": [1, 4, 768, 49]},
    ]  # fmt: skip
    compare(rows)
    found = [(row.get("published"), row.get("speedup")) for row in rows]
    nothing = (None, None)
    assert found == [
        nothing,
        (973.0, 10.0),
        nothing,
        (54.0, 100.0),
        (228.0, 2.0),
        (1.71, 10.0),
        nothing,
        nothing,
    ]
    assert published.compared("NVIDIA H200")
    assert not published.compared("NVIDIA H100 80GB HBM3")


def test_a_training_step_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    row = training.measure("mambamic_t", 2, "cpu", cpu, torch.float32, ONCE)
    assert row["batch"] == 2
    assert row["images_per_second"] == pytest.approx(2e3 / row["ms_per_step"], rel=0.01, abs=0.01)


def test_the_rest_is_measured_where_something_fails(tmp_path: Path) -> None:
    """Scans of so many images do not fit into any memory; the checkpoint's latency does."""
    from tests.random_checkpoint import write_random_checkpoint

    checkpoint = write_random_checkpoint(tmp_path / "cells")
    options = Options((str(checkpoint),), ("latency", "scan"), "cpu", scan_images=1 << 40,
                      timing=ONCE)  # fmt: skip
    record = Suite(options).run()
    assert [row["part"] for row in record["rows"]] == ["latency"]
    assert len(record["failed"]) == 8
    text = lines(record)
    for name, why in record["failed"].items():
        assert name.startswith("scan m")
        assert why
        assert f"failed: {name}: {why}" in text


def test_without_the_packages_of_training_nothing_is_measured(root: Path) -> None:
    code = (
        "import sys; sys.modules['kornia'] = None\n"
        "from mambamic.cli import main\n"
        "sys.exit(main(['benchmark', 'mambamic_t', '--device', 'cpu']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "pip install 'mambamic[train]'" in done.stderr
    assert done.stdout == ""


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="'cuda:99' is not here"):
        Suite(Options(device="cuda:99"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        Suite(Options((str(tmp_path / "nothing"),), device="cpu", timing=ONCE)).run()
