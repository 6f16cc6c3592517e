from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mambamic.errors import BackendError, UsageError
from mambamic.handlers.gate import VARIABLE
from mambamic.launcher import settings
from mambamic.launcher.folders import EXPORTER_LOG, ServerFolder
from mambamic.launcher.java import Java
from mambamic.launcher.settings import (
    CONSOLE_LOG,
    LOG_NAMES,
    Settings,
    command,
    config_properties,
    default_batch_size,
    default_workers,
    environment,
    gpu_count,
    log_config,
)

JAVA = Java(Path("java"), 17, "PATH")


def properties(asked: Settings, folder: ServerFolder) -> dict[str, str]:
    text = config_properties(asked, folder, ["0.mar", "1.mar"])
    return dict(line.split("=", 1) for line in text.splitlines())


def test_everything_is_bound_to_loopback(tmp_path: Path) -> None:
    stated = properties(Settings(port=9000), ServerFolder(tmp_path))
    assert stated["inference_address"] == "http://127.0.0.1:9000"
    assert stated["management_address"] == "http://127.0.0.1:9001"
    assert stated["metrics_address"] == "http://127.0.0.1:9002"
    assert stated["grpc_inference_address"] == stated["grpc_management_address"] == "127.0.0.1"
    assert stated["allowed_urls"] == f"file://{tmp_path}/models/.*"
    assert stated["enable_model_api"] == "false"
    assert stated["load_models"] == "0.mar,1.mar"


def test_only_predictions_follow_the_host(tmp_path: Path) -> None:
    stated = properties(Settings(host="0.0.0.0"), ServerFolder(tmp_path))
    addresses = {key for key, value in stated.items() if "0.0.0.0" in value}
    assert addresses == {"inference_address"}


@pytest.mark.parametrize(("asked", "stated"), [(False, "true"), (True, "false")])
def test_tokens_on_request(tmp_path: Path, asked: bool, stated: str) -> None:
    found = properties(Settings(token_auth=asked), ServerFolder(tmp_path))
    assert found["disable_token_authorization"] == stated


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", 80), ("port", 65533), ("workers", 0), ("batch_size", 0), ("max_batch_delay", 0)],
)
def test_numbers_are_checked(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} {value}"):
        replace(Settings(), **{name: value})


def test_hidden_gpus_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_count() == 0
    assert properties(Settings(), ServerFolder(tmp_path))["number_of_gpu"] == "0"
    with pytest.raises(BackendError, match="--device cuda"):
        properties(Settings(device="cuda"), ServerFolder(tmp_path))


def test_gpus_are_those_that_torch_can_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_count() == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    # As on a GPU machine where torch was built for CPUs.
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(settings, "DEVICES", tmp_path)
    assert gpu_count() == (1 if torch.version.cuda else 0)


def test_what_suits_gpus_and_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gives_way(device: str) -> bool:
        line = command(Settings(device=device), JAVA, ServerFolder(tmp_path), tmp_path, "python3")
        return {"-XX:CompilerThreadPriority=19", "-XX:+UseSerialGC"} <= set(line)

    devices = ("auto", "cuda", "cpu")
    monkeypatch.setattr(settings, "gpu_count", lambda: 3)
    assert [default_workers(device) for device in devices] == [6, 6, 1]
    assert [default_batch_size(device) for device in devices] == [32, 32, 8]
    assert [gives_way(device) for device in devices] == [False, False, True]
    monkeypatch.setattr(settings, "gpu_count", lambda: 0)
    assert (default_workers("auto"), default_batch_size("auto")) == (1, 8)
    assert gives_way("auto")


@pytest.mark.parametrize("host", ["::1", "[::1]", "::", "fe80::1%eth0"])
def test_an_ipv6_address_is_refused_with_what_to_use_instead(host: str) -> None:
    with pytest.raises(UsageError, match=r"0\.0\.0\.0"):
        Settings(host=host)


def test_the_frontend_is_started_without_a_wrapper(tmp_path: Path) -> None:
    java = Java(Path("/opt/java/bin/java"), 17, "PATH")
    line = command(Settings(), java, ServerFolder(tmp_path), tmp_path / "scratch", "python3")
    assert line[0] == "/opt/java/bin/java"
    assert f"-Djava.io.tmpdir={tmp_path}/scratch" in line
    (jar_folder,) = [Path(entry).parent for entry in line if entry.endswith("frontend/*")]
    assert (jar_folder / "model-server.jar").exists()


@pytest.mark.parametrize(("gigabytes", "heap"), [(1, 512), (8, 2048), (64, 4096)])
def test_the_frontend_takes_a_quarter_of_what_a_container_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gigabytes: int, heap: int
) -> None:
    monkeypatch.setattr(settings, "usable_memory", lambda: gigabytes << 30)
    line = command(Settings(), JAVA, ServerFolder(tmp_path), tmp_path, "python3")
    assert {f"-Xmx{heap}m", f"-XX:MaxDirectMemorySize={heap}m"} < set(line)


def test_workers_get_the_gate_and_not_the_users_torchserve_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TS_CONFIG_FILE", "elsewhere")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    folder = ServerFolder(tmp_path)
    variables = environment(folder, tmp_path / "logs", tmp_path / "scratch", 3)
    assert variables[VARIABLE] == str(folder.gate)
    assert variables["PROMETHEUS_MULTIPROC_DIR"] == str(folder.metrics)
    assert variables["MAMBAMIC_METRICS_PORT"] == "0"
    assert "TS_CONFIG_FILE" not in variables
    assert variables["OMP_NUM_THREADS"] == "3"
    assert (Path(variables["PYTHONPATH"].split(os.pathsep)[0]) / "mambamic").is_dir()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert environment(folder, tmp_path, tmp_path, 3)["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("foreground", [False, True])
def test_the_log_files_roll_over_and_the_console_is_for_the_foreground(
    tmp_path: Path, foreground: bool
) -> None:
    logs = tmp_path / 'a&b <c> "d" ROOT CONSOLE FILES $files %i'
    root = ElementTree.fromstring(log_config(Settings(foreground=foreground), logs))
    files = [entry.get("fileName") for entry in root.iter("RollingFile")]
    assert f"{logs}/model_log.log" in files
    assert {Path(name or "").name for name in files} | {CONSOLE_LOG, EXPORTER_LOG} == set(LOG_NAMES)
    (model_log,) = (entry for entry in root.iter("RollingFile") if entry.get("name") == "model_log")
    assert model_log.get("filePattern") == f"{logs}/model_log.%i.log.gz".replace(" %i/", " %%i/")
    assert {entry.get("additivity") for entry in root.iter("Logger")} == {
        None,
        "false",
        str(foreground).lower(),
    }
    assert len(list(root.iter("SizeBasedTriggeringPolicy"))) == len(files)
    (logger,) = root.iter("Root")
    assert ("console" in [entry.get("ref") for entry in logger]) == foreground
