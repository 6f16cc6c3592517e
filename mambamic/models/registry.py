"""Every variant by name, and the way from the published code's weights to a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mambamic.backends import SCAN_BACKENDS
from mambamic.errors import CheckpointError, UsageError
from mambamic.models.mambamic import MambaMIC, MambaMICConfig
from mambamic.models.medmamba import MedMamba, MedMambaConfig
from mambamic.models.ss2d import GatedScan

_NARROW, _WIDE = (96, 192, 384, 768), (128, 256, 512, 1024)
VARIANTS: dict[str, MambaMICConfig | MedMambaConfig] = {
    "mambamic_t": MambaMICConfig(depths=(2, 2, 4, 2), dims=_NARROW),
    "mambamic_s": MambaMICConfig(depths=(2, 2, 8, 2), dims=_NARROW),
    "mambamic_b": MambaMICConfig(depths=(2, 2, 12, 2), dims=_WIDE),
    "medmamba_t": MedMambaConfig(depths=(2, 2, 4, 2), dims=_NARROW),
    "medmamba_s": MedMambaConfig(depths=(2, 2, 8, 2), dims=_NARROW),
    "medmamba_b": MedMambaConfig(depths=(2, 2, 12, 2), dims=_WIDE),
}

# Allocated by the published code and used nowhere in its forward pass.
_UNUSED = (".pvm_layer.proj.weight", ".pvm_layer.proj.bias", ".mamba.out_proj.weight")


def create_model(name: str, num_classes: int) -> MambaMIC | MedMamba:
    """Build a freshly initialised model, in training mode.

    Args:
        name: One of ``VARIANTS``.
        num_classes: How many logits the head gives, at least 1.

    Raises:
        UsageError: There is no such variant, or the number of classes makes no sense.
    """
    if name not in VARIANTS:
        raise UsageError(f"model {name!r}", f"one of {', '.join(VARIANTS)}", "choose one of these")
    if num_classes < 1:
        raise UsageError(f"num_classes {num_classes}", "at least 1", "give the number of classes")
    config = VARIANTS[name]
    if isinstance(config, MambaMICConfig):
        return MambaMIC(config, num_classes)
    return MedMamba(config, num_classes)


def from_upstream(name: str, state_dict: Mapping[str, Tensor]) -> MambaMIC | MedMamba:
    """Build a model from the published code's weights, in evaluation mode.

    Args:
        name: One of ``VARIANTS``.
        state_dict: The published code's; the number of classes is read off its head.

    Raises:
        CheckpointError: A key is missing, unknown, or has the wrong shape.
    """
    head = state_dict.get("head.weight")
    if head is None:
        raise CheckpointError(
            "a state dict without 'head.weight'",
            f"the weights of the published {name}",
            "check that the file holds this network's weights, not a backbone's",
        )
    model = create_model(name, num_classes=head.shape[0])
    used = {
        key: value
        for key, value in state_dict.items()
        if isinstance(model, MedMamba) or not key.endswith(_UNUSED)
    }
    load_exactly(model, used, what=f"the state dict does not fit {name}")
    return model.eval()


def load_exactly(model: nn.Module, state_dict: Mapping[str, Tensor], what: str) -> None:
    """Load weights, refusing any missing, unknown or misshapen tensor by name.

    Raises:
        CheckpointError: ``what``, and the first offending key.
    """
    expected = model.state_dict()
    problem = None
    for key in sorted(expected.keys() | state_dict.keys()):
        if key not in state_dict:
            problem = f"key {key!r} is missing"
        elif key not in expected:
            problem = f"key {key!r} is unknown"
        elif state_dict[key].shape != expected[key].shape:
            problem = f"key {key!r} has shape {tuple(state_dict[key].shape)}"
        if problem:
            shape = tuple(expected[key].shape) if key in expected else None
            raise CheckpointError(
                f"{what}: {problem}",
                f"shape {shape}" if shape is not None else "no such key",
                "check the architecture's name",
            )
    model.load_state_dict(dict(state_dict))


def set_scan_backend(model: nn.Module, backend: str) -> None:
    """Make every scan of a model use one backend.

    Raises:
        UsageError: There is no backend of this name.
    """
    if backend not in SCAN_BACKENDS:
        raise UsageError(
            f"scan backend {backend!r}", f"one of {', '.join(SCAN_BACKENDS)}", "choose one of these"
        )
    for module in model.modules():
        if isinstance(module, GatedScan):
            module.scan_backend = backend
