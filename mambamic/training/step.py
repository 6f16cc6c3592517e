"""One training step apart from a run, for timing it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mambamic.models import create_model, set_scan_backend
from mambamic.training.augment import Augmentation
from mambamic.training.module import TrainingModule
from mambamic.training.recipe import Recipe

_CLASSES = 8


def make_step(
    arch: str,
    batch: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
    *,
    size: int = 224,
    compiled: bool = False,
) -> Callable[[], Tensor]:
    """Return a function that does one training step as a run does it, on random pixels.

    A call augments, computes the loss and its gradients, clips them, and updates the weights and
    their average. It returns the loss and does not wait for the device.

    Args:
        arch: One of ``models.VARIANTS``.
        batch: Images, which lie on the device already.
        device: Where to train.
        dtype: Of autocast; float32 for none.
        backend: Of the scan.
        size: Height and width in pixels.
        compiled: Whether the network goes through ``torch.compile``.
    """
    recipe = Recipe(batch_size=batch, early_share=0.0)  # of full size
    model = create_model(arch, _CLASSES)
    set_scan_backend(model, backend)
    module = TrainingModule(model, Augmentation((0.5,) * 3, (0.5,) * 3), recipe).to(device)
    optimizer = module.optimizer()
    if compiled:
        model.compile()
        module.replayed = False  # one or the other
    pixels = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)
    labels = torch.randint(0, _CLASSES, (batch,), device=device)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = module.loss(pixels, labels)
        loss.backward()
        module.note(loss)
        module.note(module.clip())
        optimizer.step()
        module.average.update_parameters(model)
        return loss.detach()

    return step
