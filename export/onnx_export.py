"""A checkpoint as one ONNX file for a stock runtime: uint8 pixels in, probabilities out."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from mambamic._version import __version__
from mambamic.checkpoint import Checkpoint
from mambamic.config import Config
from mambamic.engine import read_model
from mambamic.export.onnx_graph import Graph
from mambamic.export.onnx_networks import add_network
from mambamic.export.onnx_scan import DOMAIN, OPSET, selective_scan
from mambamic.graph.onnx import CONFIG_KEY, FLOAT_INPUT, INPUT_KEY, UINT8_INPUT

IR_VERSION = 9  # of the file format: the oldest that goes with the opset
_FUNCTIONS = 1  # the version of the functions' domain


def write_onnx(
    checkpoint: Checkpoint, out: str | os.PathLike[str], *, float_input: bool = False
) -> Path:
    """Write a checkpoint as an ONNX file, checked, and whole or not at all.

    Args:
        checkpoint: The same one gives the same bytes.
        out: The file; one that is there is replaced.
        float_input: Take normalised float32 images (B, 3, S, S) as ``images`` instead of uint8
            RGB pixels (B, S, S, 3) as ``pixels``.

    Returns:
        The path of the file.

    Raises:
        CheckpointError: The checkpoint is damaged.
    """
    target = Path(out)
    data = serialise(checkpoint, float_input=float_input)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        fresh = Path(scratch, target.name)
        fresh.write_bytes(data)
        fresh.replace(target)
    return target


def serialise(checkpoint: Checkpoint, *, float_input: bool = False) -> bytes:
    """Return the bytes of the file that ``write_onnx`` writes."""
    model = build_onnx(checkpoint, float_input=float_input)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def build_onnx(checkpoint: Checkpoint, *, float_input: bool = False) -> onnx.ModelProto:
    """Return a checkpoint as an ONNX model that ``onnx.checker`` has passed.

    Args:
        checkpoint: With weights.
        float_input: As for ``write_onnx``.

    Raises:
        CheckpointError: As ``write_onnx`` does.
    """
    config = checkpoint.config
    model = read_model(checkpoint, "reference")
    size, classes = config.input_size, len(config.classes)
    graph = Graph()
    with torch.no_grad():
        image = "images" if float_input else _normalised(graph, config)
        logits, features = add_network(graph, model, image, size)
    graph.name(logits, "logits")
    graph.name(features, "features")
    graph.name(_probabilities(graph, logits, config), "probabilities")
    value = helper.make_tensor_value_info
    given = (
        value("images", TensorProto.FLOAT, ["batch", 3, size, size])
        if float_input
        else value("pixels", TensorProto.UINT8, ["batch", size, size, 3])
    )
    outputs = [
        value("probabilities", TensorProto.FLOAT, ["batch", classes]),
        value("logits", TensorProto.FLOAT, ["batch", classes]),
        value("features", TensorProto.FLOAT, ["batch", model.head.in_features]),
    ]
    exported = helper.make_model(
        helper.make_graph(graph.nodes, config.architecture, [given], outputs, graph.constants),
        functions=[selective_scan()],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, _FUNCTIONS)],
        ir_version=IR_VERSION,
        producer_name="mambamic",
        producer_version=__version__,
        doc_string=f"{config.architecture}: {UINT8_INPUT if not float_input else FLOAT_INPUT} "
        f"images of {size} x {size} to {classes} classes. For research use.",
    )
    helper.set_model_props(exported, _metadata(config, float_input))
    onnx.checker.check_model(exported, full_check=True)
    return exported


def _normalised(graph: Graph, config: Config) -> str:
    """Append what brings uint8 pixels (B, S, S, 3) to normalised images (B, 3, S, S)."""
    graph.scope("preprocess")
    mean, std = (np.asarray(value, np.float32) * 255 for value in (config.mean, config.std))
    x = graph("Cast", "pixels", to=TensorProto.FLOAT)
    return graph.transpose(graph("Div", graph("Sub", x, mean), std), 0, 3, 1, 2)


def _probabilities(graph: Graph, logits: str, config: Config) -> str:
    scaled = graph("Div", logits, np.array(config.temperature or 1.0, np.float32))
    if config.head == "softmax":
        return graph("Softmax", scaled, axis=1)
    return graph("Sigmoid", scaled)


def _metadata(config: Config, float_input: bool) -> dict[str, str]:
    """Return what other software needs to know, each on its own, and the config as a whole."""
    facts: dict[str, Any] = {
        "architecture": config.architecture,
        "classes": "\n".join(config.classes),
        "input_size": config.input_size,
        "resize": config.resize,
        "interpolation": config.interpolation,
        "mean": " ".join(map(str, config.mean)),
        "std": " ".join(map(str, config.std)),
        "head": config.head,
        "temperature": config.temperature or 1.0,
        "licence": config.licence,
        "training_data": config.training_data,
        "weights_sha256": config.weights_sha256,
        "exported_by": f"mambamic {__version__}",
    }
    named = {f"mambamic.{key}": str(value) for key, value in facts.items()}
    kind = FLOAT_INPUT if float_input else UINT8_INPUT
    return {**named, INPUT_KEY: kind, CONFIG_KEY: config.to_json()}
