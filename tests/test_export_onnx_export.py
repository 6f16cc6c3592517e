"""Exported networks against torch, at batches that no export has seen."""

from __future__ import annotations

import time
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from mambamic import create_model
from mambamic.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mambamic.config import Config
from mambamic.export.onnx_export import build_onnx, serialise, write_onnx
from mambamic.export.onnx_scan import DOMAIN, NAME, OPSET
from mambamic.export.onnx_verify import BATCHES, TOLERANCE, random_pixels, verify
from mambamic.graph.onnx import CONFIG_KEY
from mambamic.images import decode
from mambamic.models import VARIANTS
from tests.golden_fill import image_for
from tests.test_models import CASES, golden_model, outputs

LIMITS = {"mambamic_t": 16e6, "medmamba_t": 60e6}  # bytes
CLASSES = tuple("abcdefgh")


def random_weights(folder: Path, name: str, size: int, **fields: object) -> Checkpoint:
    """Write a checkpoint whose norms, statistics and skips are not those of a fresh model."""
    torch.manual_seed(1)
    model = create_model(name, len(CLASSES))
    for key, tensor in model.state_dict().items():
        if key.endswith(("running_mean", "norm.bias", "skip_scale")):
            tensor.add_(torch.randn_like(tensor) * 0.1)
        if key.endswith("running_var"):
            tensor.mul_(torch.rand_like(tensor) + 0.5)
    model.head.weight.data.mul_(20)
    config = Config(name, CLASSES, input_size=size, mean=(0.7, 0.6, 0.5), **fields)  # type: ignore[arg-type]
    return save_checkpoint(folder / name, config, model.state_dict(), "# Random\n")


@pytest.mark.parametrize("name", ["mambamic_t", "medmamba_t"])
def test_says_what_torch_says_at_every_batch(name: str, tmp_path: Path) -> None:
    checkpoint = random_weights(tmp_path, name, 64, temperature=1.7)
    path = write_onnx(checkpoint, tmp_path / "model.onnx")
    assert path.stat().st_size < LIMITS[name]
    found = list(verify(checkpoint, path, random_pixels(8, 64)))
    assert [agreement.batch for agreement in found] == list(BATCHES) == [1, 2, 3, 8]
    assert all(agreement.holds for agreement in found), found


@pytest.mark.soak
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_in_full_size(name: str, tmp_path: Path) -> None:
    checkpoint = random_weights(tmp_path, name, 224)
    begun = time.perf_counter()
    path = write_onnx(checkpoint, tmp_path / "model.onnx")
    written = time.perf_counter()
    onnxruntime.InferenceSession(path)
    loaded = time.perf_counter()
    print(f"{name}: written in {written - begun:.1f} s, loaded in {loaded - written:.2f} s")
    assert written - begun < 120
    assert loaded - written < 1
    assert path.stat().st_size < LIMITS.get(name, 200e6)
    found = list(verify(checkpoint, path, random_pixels(3, 224)))
    assert all(agreement.holds for agreement in found), found


@pytest.mark.soak
def test_200_real_cells(root: Path, data_dir: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(root / "model_store" / "mambamic_t_pbc")
    with zipfile.ZipFile(data_dir / "pbc200" / "test.zip") as archive:
        names = sorted(name for name in archive.namelist() if not name.endswith("/"))
        cells = [decode(archive.read(name)) for name in names[:: len(names) // 200][:200]]
    pixels = np.stack([checkpoint.config.preprocess.pixels(cell) for cell in cells])
    path = write_onnx(checkpoint, tmp_path / "model.onnx")
    found = list(verify(checkpoint, path, pixels))
    assert min(agreement.images for agreement in found) == 200
    assert all(agreement.holds for agreement in found), found


@pytest.mark.parametrize(
    "case",
    [
        # The largest variants take the same path, and longest.
        pytest.param(
            case,
            id=str(case["tag"]),
            marks=[pytest.mark.soak] * (case["size"] != 64 or case["variant"] == "b"),
        )
        for case in CASES
    ],
)
def test_golden_inputs(case: dict[str, int | str], tmp_path: Path) -> None:
    model = golden_model(case, "cpu", "cpu")
    name = f"{case['family']}_{case['variant']}"
    classes = tuple(str(i) for i in range(int(case["num_classes"])))
    size = int(case["size"])
    config = Config(name, classes, input_size=size)
    checkpoint = save_checkpoint(tmp_path / "golden", config, model.state_dict(), "# Golden\n")
    session = onnxruntime.InferenceSession(serialise(checkpoint, float_input=True))
    image = image_for(int(case["batch"]), size, int(case["seed"]))
    probabilities, logits = session.run(["probabilities", "logits"], {"images": image})
    golden = outputs()[f"{case['tag']}/logits"]
    assert np.abs(logits - golden).max() < 1e-4
    chances = torch.from_numpy(golden).softmax(1).numpy()
    assert np.abs(probabilities - chances).max() < TOLERANCE


def test_float_input_sigmoid_and_a_side_that_is_no_power_of_two(tmp_path: Path) -> None:
    checkpoint = random_weights(tmp_path, "mambamic_t", 75, head="sigmoid")
    path = write_onnx(checkpoint, tmp_path / "model.onnx", float_input=True)
    assert all(found.holds for found in verify(checkpoint, path, random_pixels(2, 75), [1, 2]))


def test_nothing_but_standard_operators_and_the_function(random_checkpoint: Path) -> None:
    model = build_onnx(load_checkpoint(random_checkpoint))
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {
        ("", OPSET),
        (DOMAIN, 1),
    }
    assert [(function.domain, function.name) for function in model.functions] == [(DOMAIN, NAME)]
    assert {node.domain for node in model.graph.node} == {"", DOMAIN}
    assert {node.domain for node in model.functions[0].node} == {""}
    assert {node.op_type for node in model.graph.node if node.domain} == {NAME}
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_metadata_say_how_to_use_it(random_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    model = onnx.load_from_string(serialise(checkpoint))
    stated = {entry.key: entry.value for entry in model.metadata_props}
    assert Config.from_json(stated[CONFIG_KEY]) == checkpoint.config
    assert stated["mambamic.classes"].split("\n") == list(checkpoint.config.classes)
    assert stated["mambamic.weights_sha256"] == checkpoint.config.weights_sha256
    (given,) = model.graph.input
    dims = given.type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 64, 64, 3]


def test_same_bytes_each_time(random_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    assert serialise(checkpoint) == serialise(checkpoint)
