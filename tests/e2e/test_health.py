"""Servers side by side: probes of those that are well and of one that is not; what they share."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import urllib3

from mambamic.export.archive import MODEL_CONFIG_FILE, write_archive
from mambamic.launcher.probe import token

from .servers import ROOT, RunningServer, of_state, run_mambamic, serve, wait_for


def ask(server: RunningServer, question: str) -> subprocess.CompletedProcess[str]:
    return run_mambamic(server.state, "health", question, "--port", str(server.port))


@pytest.fixture(scope="module")
def pair(quick_checkpoint: Path) -> Iterator[tuple[RunningServer, RunningServer]]:
    """A server of two models, and one that wants tokens."""
    with tempfile.TemporaryDirectory(prefix="mambamic-test-") as folder:
        state, model = Path(folder), str(quick_checkpoint)
        archive = write_archive(
            quick_checkpoint, state / "given.mar", model_name="given", version="3.0"
        )
        with (
            serve(state, model, "--device", "cpu", "--model", f"{archive}=other:2.5") as one,
            serve(state, model, "--device", "cpu", "--token-auth") as two,
        ):
            yield one, two
        assert of_state(state) == []


@pytest.fixture
def impatient(quick_checkpoint: Path, tmp_path: Path) -> Path:
    """An archive whose workers TorchServe gives up on after two seconds, not five minutes."""
    source = write_archive(quick_checkpoint, tmp_path / "source.mar")
    target = tmp_path / "impatient.mar"
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as copy:
        for name in archive.namelist():
            more = b"maxRetryTimeoutInSec: 2\n" if name == MODEL_CONFIG_FILE else b""
            copy.writestr(name, archive.read(name) + more)
    return target


@pytest.mark.parametrize("which", [0, 1])
def test_a_server_that_is_well(pair: tuple[RunningServer, RunningServer], which: int) -> None:
    server = pair[which]
    models = ["mambamic/1.0", "other/2.5"][: 2 - which]
    for question, said in (("--ready", "ready"), ("--live", "live")):
        answer = ask(server, question)
        assert (answer.returncode, answer.stderr) == (0, "")
        assert answer.stdout == f"{said}: {', '.join(models)}\n"
    address = f"http://127.0.0.1:{server.port + 3}/metrics"
    told = urllib3.request("GET", address, retries=False, timeout=30).data.decode()
    counts = dict(line.rsplit(" ", 1) for line in told.splitlines() if line[0] != "#")
    probes = [name for name in counts if 'operation="probe"' in name and "requests" in name]
    assert len(probes) == len(models)
    assert {counts[name] for name in probes} == {"1.0"}
    # Each model was asked for one prediction when it started, and for none since.
    made = [name for name in counts if name.startswith("mambamic_predictions_total")]
    assert sum(float(counts[name]) for name in made) == len(models)


def test_a_worker_that_is_given_up_on(impatient: Path, state: Path) -> None:
    with serve(state, str(impatient), "--device", "cpu") as server:
        assert ask(server, "--live").returncode == 0
        record = server.folder.read()
        assert record is not None
        (weights,) = Path(record.scratch).glob("models/*/model.safetensors")
        weights.write_bytes(weights.read_bytes()[:1000])
        (victim,) = server.worker_pids()
        os.kill(victim, signal.SIGKILL)
        assert wait_for(lambda: "TorchServe's health is 500" in ask(server, "--live").stderr, 60)
        # The frontend runs and accepts requests, which then wait for ever.
        java = record.process()
        assert java is not None
        unready = run_mambamic(
            state, "health", "--ready", "--timeout", "2", "--port", str(server.port)
        )
        assert unready.returncode == 1
        assert re.search(r"no answer to POST /predictions/mambamic/1.0 .*timed out", unready.stderr)
        # A stop would wait half a minute for the request that was just sent.
        java.kill()


def _listening_addresses(pid: int) -> set[str]:
    connections = psutil.Process(pid).net_connections(kind="inet")
    return {
        connection.laddr.ip.removeprefix("::ffff:")
        for connection in connections
        if connection.status == psutil.CONN_LISTEN
    }


# The last: it stops one of the two.
def test_two_servers_and_two_models_on_one_machine(
    pair: tuple[RunningServer, RunningServer], quick_checkpoint: Path, cell: bytes
) -> None:
    one, two = pair
    one_answer = one.body(cell)
    assert one_answer.json["version"] == "1.0"
    one.model = "other/2.5"
    other = one.body(cell).json
    assert (other["model"], other["version"]) == ("other", "2.5")
    assert other["probabilities"] == pytest.approx(one_answer.json["probabilities"], abs=1e-5)

    assert two.body(cell).status == 400  # TorchServe's answer to a missing token
    header = token(two.folder, two.port)
    # Asking again, as --stop does, leaves the clients' token as it is.
    assert token(two.folder, two.port) == header
    assert two.body(cell, headers=header).status == 200
    (curl,) = (line[2:] for line in two.printed.splitlines() if line.startswith("$ curl"))
    printed = subprocess.run(
        ["sh", "-c", curl], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    )
    assert "label" in json.loads(printed.stdout)
    assert str(two.folder.keys) in two.printed.splitlines()[2]

    taken = run_mambamic(
        one.state, "serve", "--port", str(one.port), "--model", str(quick_checkpoint)
    )
    assert taken.returncode == 1
    assert f"already running on port {one.port}" in taken.stderr
    below = run_mambamic(
        one.state, "serve", "--port", str(one.port - 1), "--model", str(quick_checkpoint)
    )
    assert below.returncode == 1
    assert f"port {one.port} on 127.0.0.1" in below.stderr
    assert "--port" in below.stderr

    records = [server.folder.read() for server in (one, two)]
    pids = [record.pid for record in records if record is not None]
    assert len(pids) == 2
    assert all(_listening_addresses(pid) == {"127.0.0.1"} for pid in pids)
    run_mambamic(one.state, "serve", "--stop", "--port", str(one.port))
    left = {process.pid for process in of_state(one.state)}
    assert pids[0] not in left
    assert pids[1] in left
