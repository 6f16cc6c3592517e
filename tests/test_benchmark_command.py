"""``mambamic benchmark``, called as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mambamic.cli import main


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["benchmark", "--help"])
    assert status.value.code == 0
    out = capsys.readouterr().out
    assert "example:\n  mambamic benchmark\n" in out
    assert "exit status" in out


def test_a_run(random_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.json"
    few = ["--batches", "1", "--repeats", "1", "--warmup", "1", "--device", "cpu"]
    call = ["benchmark", str(random_checkpoint), "--only", "throughput", "latency", *few]
    assert main([*call, "--dtype", "bfloat16", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert [row["part"] for row in record["rows"]] == ["throughput", "latency"]
    assert {row["dtype"] for row in record["rows"]} == {"bfloat16"}
    printed = capsys.readouterr().out
    assert record["device"] in printed
    assert f"{record['rows'][1]['p50_ms']:.2f} ms" in printed


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere"], 1, "cannot be read"),
        (["--device", "tpu"], 2, "device 'tpu'"),
        (["--out", "no/such/folder/x.json"], 2, "create the folder"),
    ],
)
def test_a_run_that_cannot_start(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", *arguments]) == status
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--only", "--batches", "--repeats"])
def test_a_wrong_call(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["benchmark", option, "0"])
    assert status.value.code == 2
    assert option in capsys.readouterr().err
