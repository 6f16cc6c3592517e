"""What is asked of a server, and TorchServe's configuration that says so."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import runpy
from dataclasses import dataclass
from pathlib import Path
from string import Template
from xml.sax.saxutils import quoteattr

from mambamic.errors import BackendError, ServerError, UsageError
from mambamic.export.archive import RESPONSE_TIMEOUT_S
from mambamic.handlers.gate import VARIABLE as GATE_VARIABLE
from mambamic.handlers.metric_files import FOLDER_VARIABLE, PORT_VARIABLE
from mambamic.launcher.folders import EXPORTER_LOG, MAIN_CLASS, ServerFolder
from mambamic.launcher.java import Java
from mambamic.machine import usable_memory

# 256 tiles of a megabyte; a response holds probabilities, or pictures in answer to one request.
MAX_REQUEST_BYTES = 256 * 1024 * 1024
MAX_RESPONSE_BYTES = 64 * 1024 * 1024
QUEUE_SIZE = 1000
DEVICES = Path("/dev")

_LOG_CONFIG = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration>
  <Appenders>
    <Console name="console" target="SYSTEM_OUT">
      <PatternLayout pattern="%d{ISO8601} [%-5p] %t - %m%n%ex"/>
    </Console>
$files  </Appenders>
  <Loggers>
    <Logger name="ACCESS_LOG" level="info" additivity="false">
      <AppenderRef ref="access_log"/>
    </Logger>
    <Logger name="MODEL_LOG" level="info" additivity="$foreground">
      <AppenderRef ref="model_log"/>
    </Logger>
    <Logger name="org.pytorch.serve.http" level="info" additivity="false">
      <AppenderRef ref="http_log"/>
    </Logger>
    <Logger name="MODEL_METRICS" level="all" additivity="false">
      <AppenderRef ref="model_metrics"/>
    </Logger>
    <Logger name="TS_METRICS" level="all" additivity="false">
      <AppenderRef ref="ts_metrics"/>
    </Logger>
    <Logger name="io.netty" level="error"/>
    <Logger name="org.apache" level="off"/>
    <Root level="info">
$root      <AppenderRef ref="ts_log"/>
    </Root>
  </Loggers>
</Configuration>
"""
_LOG_FILE = """    <RollingFile name="$name" fileName=$file filePattern=$rolled>
      <PatternLayout pattern="%d{ISO8601} [%-5p] %t - $message%n$exceptions"/>
      <Policies><SizeBasedTriggeringPolicy size="50 MB"/></Policies>
      <DefaultRolloverStrategy max="5"/>
    </RollingFile>
"""
# The frontend's form parser quotes the body that it could not read in its exceptions: of what is
# logged while a request is read, exceptions are left out.
_LOG_FILES = {
    "access_log": "%ex",
    "http_log": "%ex{0}",
    "model_log": "%ex",
    "model_metrics": "%ex",
    "ts_log": "%ex",
    "ts_metrics": "%ex",
}
# TorchServe makes nothing of an address's query, in which a client may have put a file's name.
_LOG_MESSAGES = {"access_log": "%replace{%m}{[?][^ ]*}{}"}
CONSOLE_LOG = "console.log"
LOG_NAMES = (CONSOLE_LOG, EXPORTER_LOG, *(f"{name}.log" for name in _LOG_FILES))


# Without a GPU the model wants the cores that Java takes beside requests. Its second compiler takes
# whole ones for the first minutes, but without it a lone request of a model that takes no time
# needs 1.5 ms and not 1.0: so it begins later, at eight times its usual thresholds, with what is
# really called often. Both compile with what is left over; no other thread is before or behind the
# model's, whoever the user is. The collector of one thread has no work of its own between its
# pauses, of which a small heap makes little.
_BESIDE_A_MODEL = (
    "-XX:Tier4InvocationThreshold=40000",
    "-XX:Tier4MinInvocationThreshold=4800",
    "-XX:Tier4CompileThreshold=120000",
    "-XX:Tier4BackEdgeThreshold=320000",
    "-XX:ThreadPriorityPolicy=1",
    "-XX:CompilerThreadPriority=19",
    *(f"-XX:JavaPriority{above}_To_OSPriority=0" for above in range(6, 11)),
    "-XX:+IgnoreUnrecognizedVMOptions",  # a later Java may lack one of these
    "-XX:-PrintWarnings",  # that a user may not raise a priority, which nobody asks for
    "-XX:+UseSerialGC",
)


@dataclass(frozen=True)
class Settings:
    """What ``mambamic serve`` was asked for.

    Args:
        port: Of predictions; management, TorchServe's metrics and ours take the three after it.
        host: The address of predictions, IPv4 or a name; management and metrics stay on loopback.
        workers: Processes per model.
        device: ``auto``, ``cpu`` or ``cuda``.
        backend: Of the scan, ``auto`` or a name.
        token_auth: Whether requests need TorchServe's tokens.
        batch_size: At most so many requests per batch.
        max_batch_delay: Milliseconds to wait for a batch to fill.
        decoders: Processes of each worker that decode images; 0 decodes in its threads.
        foreground: Whether to log to the console too.
    """

    port: int = 8080
    host: str = "127.0.0.1"
    workers: int = 1
    device: str = "auto"
    backend: str = "auto"
    token_auth: bool = False
    batch_size: int = 32
    max_batch_delay: int = 1
    decoders: int = 0
    foreground: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 1024, 65532),
            ("workers", 1, 256),
            ("batch_size", 1, 1024),
            ("max_batch_delay", 1, 10_000),
            ("decoders", 0, 256),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(
                    f"--{name.replace('_', '-')} {value}",
                    f"a number from {low} to {high}",
                    "choose another value",
                )
        if _is_ipv6(self.host):
            raise UsageError(
                f"--host {self.host}",
                "an IPv4 address or a host name: TorchServe cannot be told an IPv6 address",
                "use a name that stands for the address, or 0.0.0.0, which is every address of "
                "this machine, IPv6 included",
            )

    @property
    def management_port(self) -> int:
        """Where TorchServe's management API answers, on loopback."""
        return self.port + 1

    @property
    def metrics_port(self) -> int:
        """Where TorchServe gives its own metrics, on loopback."""
        return self.port + 2

    @property
    def exporter_port(self) -> int:
        """Where the metrics of ``mambamic.metrics`` are given, on loopback."""
        return self.port + 3


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).version == 6
    except ValueError:
        return False


def gpu_count() -> int:
    """Return how many NVIDIA GPUs workers may use, without importing torch: that takes seconds."""
    if _cuda_of_torch() is None:
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len(list(DEVICES.glob("nvidia[0-9]*")))
    if visible is None or not present:
        return present
    return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])


def default_workers(device: str) -> int:
    """Return how many workers a model gets where nobody says.

    One on a CPU, which it fills. Two for each GPU: one decodes while the other classifies, and
    while a killed one starts again the other answers.
    """
    return max(1, 2 * _gpus_for(device))


def default_batch_size(device: str) -> int:
    """Return how many requests are classified together at most where nobody says.

    On a CPU a batch of eight is as fast by the image as a larger one, and of small ones everybody
    waits for the same number.
    """
    return 32 if _gpus_for(device) else 8


def _gpus_for(device: str) -> int:
    return 0 if device == "cpu" else gpu_count()


def _cuda_of_torch() -> str | None:
    """Return the CUDA version that torch is built for, or None for a build without it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    # A file of constants beside the package's own.
    stated = runpy.run_path(str(Path(spec.origin).with_name("version.py"))).get("cuda")
    return None if stated is None else str(stated)


def _gpus(settings: Settings) -> int:
    found = _gpus_for(settings.device)
    if settings.device == "cuda" and not found:
        raise BackendError(
            f"--device cuda: no NVIDIA GPU is usable (the CUDA version of torch: "
            f"{_cuda_of_torch() or 'none, a CPU build'})",
            "a GPU and its driver, not hidden by CUDA_VISIBLE_DEVICES, and a CUDA build of torch",
            "use --device auto or cpu; mambamic doctor shows what is there",
        )
    return found


def config_properties(settings: Settings, folder: ServerFolder, archives: list[str]) -> str:
    """Return TorchServe's configuration.

    Args:
        settings: What was asked for.
        folder: The server's folder.
        archives: File names in the folder's store.

    Raises:
        BackendError: A GPU was asked for and none is there.
    """
    lines = {
        "inference_address": f"http://{settings.host}:{settings.port}",
        "management_address": f"http://127.0.0.1:{settings.management_port}",
        "metrics_address": f"http://127.0.0.1:{settings.metrics_port}",
        "grpc_inference_address": "127.0.0.1",
        "grpc_management_address": "127.0.0.1",
        # The system chooses: so servers on one machine do not meet.
        "grpc_inference_port": "0",
        "grpc_management_port": "0",
        "model_store": str(folder.store),
        "load_models": ",".join(archives),
        "allowed_urls": f"file://{folder.store}/.*",
        "enable_model_api": "false",
        "disable_token_authorization": str(not settings.token_auth).lower(),
        "install_py_dep_per_model": "false",
        "enable_envvars_config": "false",
        "number_of_gpu": str(_gpus(settings)),
        "default_workers_per_model": str(settings.workers),
        "job_queue_size": str(QUEUE_SIZE),
        "default_response_timeout": str(RESPONSE_TIMEOUT_S),
        "max_request_size": str(MAX_REQUEST_BYTES),
        "max_response_size": str(MAX_RESPONSE_BYTES),
        "decode_input_request": "false",
        "metrics_mode": "prometheus",
    }
    return "".join(f"{key}={value}\n" for key, value in lines.items())


def log_config(settings: Settings, logs: Path) -> str:
    """Return the frontend's logging configuration: files that roll over, console on request."""
    files = "".join(
        Template(_LOG_FILE).substitute(
            name=name,
            file=quoteattr(str(logs / f"{name}.log")),
            # In a pattern a percent sign begins a field.
            rolled=quoteattr(str(logs).replace("%", "%%") + f"/{name}.%i.log.gz"),
            message=_LOG_MESSAGES.get(name, "%m"),
            exceptions=exceptions,
        )
        for name, exceptions in _LOG_FILES.items()
    )
    return Template(_LOG_CONFIG).substitute(
        files=files,
        root='      <AppenderRef ref="console"/>\n' if settings.foreground else "",
        foreground=str(settings.foreground).lower(),
    )


def command(
    settings: Settings, java: Java, folder: ServerFolder, scratch: Path, python: str
) -> list[str]:
    """Return the command line of the frontend, Java itself and no wrapper around it.

    Args:
        settings: What was asked for.
        java: The runtime.
        folder: The server's folder.
        scratch: Its temporary folder, with a short path: worker sockets live there.
        python: The interpreter of the workers.

    Raises:
        ServerError: TorchServe is not installed.
    """
    home = _torchserve_home()
    # A body is held a few times over on its way to a worker; the limit is a cap, not a claim.
    heap = min(max(usable_memory() // 4, 1 << 29), 1 << 32) >> 20
    return [
        str(java.executable),
        *java.options(),
        *([] if _gpus_for(settings.device) else _BESIDE_A_MODEL),
        "-Xms64m",
        f"-Xmx{heap}m",
        f"-XX:MaxDirectMemorySize={heap}m",
        "-XX:+ExitOnOutOfMemoryError",
        f"-Dmodel_server_home={home}",
        f"-Djava.io.tmpdir={scratch}",
        f"-Dlog4j.configurationFile={folder.log_config.as_uri()}",
        "-cp",
        str(home / "ts" / "frontend" / "*"),
        MAIN_CLASS,
        "--python",
        python,
        "-f",
        str(folder.config),
        "-s",
        str(folder.store),
        "-ncs",
    ]


def _torchserve_home() -> Path:
    from importlib.util import find_spec

    spec = find_spec("ts")
    if spec is None or spec.origin is None:
        raise ServerError(
            "TorchServe is not installed",
            "torchserve 0.12.0 beside mambamic",
            "run pip install 'mambamic[serve]'",
        )
    return Path(spec.origin).parent.parent


def environment(folder: ServerFolder, logs: Path, scratch: Path, threads: int) -> dict[str, str]:
    """Return the environment of the frontend, which the workers inherit.

    Args:
        folder: The server's folder.
        logs: Where to log.
        scratch: The temporary folder.
        threads: How many threads a worker computes with, unless the user has said so.
    """
    ours = {key: value for key, value in os.environ.items() if not key.startswith("TS_")}
    ours.setdefault("OMP_NUM_THREADS", str(threads))
    # What is NumPy's in a worker is small: threads for it would only be in each other's way.
    ours.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Workers run the mambamic that starts them, also from a checkout that is not installed.
    root = str(Path(__file__).resolve().parents[2])
    ours["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {
        **ours,
        GATE_VARIABLE: str(folder.gate),
        FOLDER_VARIABLE: str(folder.metrics),
        # The launcher's exporter has the port.
        PORT_VARIABLE: "0",
        "LOG_LOCATION": str(logs),
        "METRICS_LOCATION": str(logs),
        "TMPDIR": str(scratch),
        "TS_DECODE_INPUT_REQUEST": "false",
    }
