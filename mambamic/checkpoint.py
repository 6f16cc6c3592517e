"""A checkpoint: a folder with ``config.json``, ``model.safetensors`` and ``README.md``."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mambamic._version import __version__
from mambamic.config import Config
from mambamic.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)
OOD_FILE = "ood.safetensors"  # where a detector was fitted, see ``ood``

# The exponent of the decay, step sizes and variances span more than half precision resolves, and
# together they are a small part of the weights.
_KEPT = re.compile(
    r"(^|\.)(A_logs|Ds|dt_projs_bias|skip_scale|running_mean|running_var|num_batches_tracked)$"
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config has been checked and whose weights have the hash that it states.

    Args:
        path: The folder.
        config: Its ``config.json``.
    """

    path: Path
    config: Config

    def weights(self) -> bytes:
        """Read ``model.safetensors``.

        Raises:
            CheckpointError: It is missing, or has another hash than the config states.
        """
        file = self.path / WEIGHTS_FILE
        data = _read(file)
        digest = hashlib.sha256(data).hexdigest()
        if digest != self.config.weights_sha256:
            raise CheckpointError(
                f"{file} has SHA-256 {digest}",
                f"{self.config.weights_sha256}, as {CONFIG_FILE} states",
                "get the checkpoint again: the weights are damaged or were exchanged",
            )
        return data

    def card(self) -> str:
        """Read ``README.md``, the model card.

        Raises:
            CheckpointError: It is missing.
        """
        return _read(self.path / CARD_FILE).decode("utf-8", "replace")

    def state_dict(self, *, as_stored: bool = False) -> dict[str, Tensor]:
        """Read the weights.

        Args:
            as_stored: Keep half precision where the file has it, instead of float32.

        Returns:
            CPU tensors by key.

        Raises:
            CheckpointError: The file is missing, damaged, or has another hash.
        """
        # Here, because a torch-free installation reads configs and hashes too.
        import safetensors.torch
        from safetensors import SafetensorError

        try:
            tensors: dict[str, Tensor] = safetensors.torch.load(self.weights())
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.path / WEIGHTS_FILE} cannot be read ({error})",
                "a safetensors file",
                "get the checkpoint again",
            ) from error
        if as_stored:
            return tensors
        return {
            key: tensor.float() if tensor.is_floating_point() else tensor
            for key, tensor in tensors.items()
        }


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint folder, checking every field of its config and the hash of its weights.

    Raises:
        CheckpointError: A file is missing or damaged, or the hash is another.
    """
    folder = Path(path)
    config = Config.from_json(_read(folder / CONFIG_FILE).decode("utf-8", "replace"))
    checkpoint = Checkpoint(folder, config)
    checkpoint.weights()
    return checkpoint


def save_checkpoint(
    path: str | os.PathLike[str],
    config: Config,
    state_dict: Mapping[str, Tensor],
    card: str,
    *,
    half: bool = False,
) -> Checkpoint:
    """Write a checkpoint folder, whole or not at all.

    Args:
        path: The folder. One that is there is replaced if it holds a checkpoint and nothing else.
        config: The hash and the version in it are set here.
        state_dict: The model's.
        card: The model card, Markdown.
        half: Store float16, except state-space parameters and running statistics.

    Returns:
        What was written.

    Raises:
        UsageError: Something else is at ``path``.
    """
    import safetensors.torch

    folder = Path(path)
    _check_replaceable(folder)
    weights = {key: _storable(key, tensor, half) for key, tensor in state_dict.items()}
    data = safetensors.torch.save(weights, metadata={"format": "pt"})
    config = replace(
        config, weights_sha256=hashlib.sha256(data).hexdigest(), mambamic_version=__version__
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        fresh = Path(temporary, "new")
        fresh.mkdir()
        (fresh / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
        (fresh / WEIGHTS_FILE).write_bytes(data)
        (fresh / CARD_FILE).write_text(card, encoding="utf-8")
        exchange(fresh, folder)
    return Checkpoint(folder, config)


def write_file(checkpoint: Checkpoint, name: str, data: bytes) -> Path:
    """Write one file of a checkpoint, whole or not at all; the others are not touched.

    Raises:
        CheckpointError: The folder cannot be written to.
    """
    target = checkpoint.path / name
    try:
        descriptor, path = tempfile.mkstemp(prefix=f".{name}.", dir=checkpoint.path)
        fresh = Path(path)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            fresh.chmod(target.stat().st_mode if target.exists() else 0o644)
            fresh.replace(target)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written ({error.strerror})",
            "a checkpoint in a folder that you may write to",
            "work on a copy of the checkpoint",
        ) from error
    return target


def exchange(fresh: Path, folder: Path) -> None:
    """Put the folder ``fresh`` in the place of ``folder``, which comes back if that fails."""
    if not folder.exists():
        fresh.rename(folder)
        return
    # Beside the temporary folder, not in it: whatever happens, its clean-up must not take this.
    old = folder.with_name(f"{folder.name}.replaced-{os.getpid()}")
    folder.rename(old)
    try:
        fresh.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def _storable(key: str, tensor: Tensor, half: bool) -> Tensor:
    import torch

    stored = tensor.detach().cpu()
    if stored.is_floating_point():
        stored = stored.to(torch.float32)
        halved = stored.to(torch.float16)
        if half and not _KEPT.search(key) and bool(torch.isfinite(halved).all()):
            stored = halved
    # A copy of its own: safetensors refuses tensors that share memory.
    return stored.clone(memory_format=torch.contiguous_format)


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    others = (
        [folder]
        if not folder.is_dir()
        else [p for p in folder.iterdir() if p.name not in (*FILES, OOD_FILE)]
    )
    if others:
        raise UsageError(
            f"{others[0]} is in the way",
            "a new folder, or one with a checkpoint alone",
            "give another folder",
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        inside = path.parent / "checkpoint"  # where a training run leaves it
        run = (inside / path.name).is_file()
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror})",
            f"a checkpoint folder with {', '.join(FILES)}",
            f"give {inside}" if run else "check the path, or get the checkpoint again",
        ) from error
