"""The training step, the validation step and the optimiser, for Lightning."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from mambamic.training.augment import Augmentation
from mambamic.training.recipe import Recipe, epoch_seed


class MovingAverage(AveragedModel):
    """The moving average of a model's weights and buffers, without waiting for the device.

    Buffers are averaged too: running statistics belong to the weights they were taken with.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self._decay = decay
        self._begun: bool | None = None

    def update_parameters(self, model: nn.Module) -> None:
        """Follow the weights: take them over the first time, and then go a part of the way."""
        if self._begun is None:  # known to the device alone where a run is resumed
            self._begun = bool(self.n_averaged > 0)
        weight = 1 - self._decay if self._begun else 1.0
        averages = [*self.module.parameters(), *self.module.buffers()]
        current = [*model.parameters(), *model.buffers()]
        pairs = list(zip(averages, current, strict=True))
        moving = [pair for pair in pairs if pair[0].is_floating_point()]
        counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        with torch.no_grad():
            torch._foreach_lerp_([a for a, _ in moving], [c for _, c in moving], weight)
            if counters:
                torch._foreach_copy_([a for a, _ in counters], [c for _, c in counters])
            self.n_averaged += 1
        self._begun = True


def criterion(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the mean loss of (B, C) logits: cross-entropy, per class where labels are several.

    Args:
        logits: (B, C).
        labels: (B,) indices, or (B, C) of 0 and 1.
        smoothing: How much of a label is spread over what it is not.
    """
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    target = labels.to(logits.dtype) * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits, target)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of right labels; shapes as in ``criterion``."""
    right = logits.argmax(-1) == labels if labels.ndim == 1 else (logits > 0) == (labels > 0)
    return right.float().mean()


def capture(model: nn.Module, images: Tensor) -> None:
    """Replay a model's forward and backward pass as CUDA graphs whenever it trains.

    They are thousands of short kernels, which take the GPU less time than the host needs to
    launch them. Every later batch must have the shape of this one. What the trial runs before the
    capture change is put back: running statistics and the state of the random numbers.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    random = torch.cuda.get_rng_state(images.device)
    dtype = torch.get_autocast_dtype("cuda")
    enabled = torch.is_autocast_enabled("cuda")
    # Parameters' gradients are summed on the stream of the capture for good, which torch mentions.
    mention = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if mention is not None:
        mention(False)
    with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
        torch.cuda.make_graphed_callables(model, (torch.empty_like(images).normal_(),))
    torch.cuda.set_rng_state(random, images.device)
    for buffer, before in buffers:
        buffer.copy_(before)


class TrainingModule(pl.LightningModule):
    """A model in training, with the moving average of its weights, which is what is kept."""

    def __init__(self, model: nn.Module, augmentation: Augmentation, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.augmentation, self.recipe = model, augmentation, recipe
        self.average = MovingAverage(model, recipe.ema_decay)
        self.to_capture = True  # at the first step on a GPU

    def loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of one batch of (B, S, S, 3) uint8 pixels and (B,) or (B, C) labels."""
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            images = self.augmentation(pixels)
        if images.is_cuda and self.to_capture:
            self.to_capture = False
            capture(self.model, images)
        return criterion(self.model(images).float(), labels, self.recipe.label_smoothing)

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        """Return the loss of one batch."""
        loss = self.loss(*batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm, which Lightning's own refuses to do for a fused optimiser."""
        if gradient_clip_val is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), gradient_clip_val)

    def on_train_batch_end(self, *_: Any) -> None:
        """Follow the weights with their average."""
        self.average.update_parameters(self.model)

    def on_train_epoch_start(self) -> None:
        """Make all that is random depend on the seed and the epoch alone.

        A resumed run then does what it would have done without the stop.
        """
        batches = self.trainer.train_dataloader
        assert batches is not None
        batches.epoch = self.current_epoch
        torch.manual_seed(epoch_seed(self.recipe.seed, self.current_epoch))

    def validation_step(self, batch: tuple[Tensor, Tensor], _index: int) -> None:
        """Score the averaged model on one batch."""
        pixels, labels = batch
        logits = self.average(self.augmentation(pixels)).float()
        size = labels.shape[0]
        self.log("val_loss", criterion(logits, labels), batch_size=size, prog_bar=True)
        self.log("val_accuracy", accuracy(logits, labels), batch_size=size, prog_bar=True)

    def optimizer(self) -> AdamW:
        """Return AdamW at the full rate, with what is exempt from weight decay as group 1."""
        recipe = self.recipe
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            exempt = parameter.ndim < 2 or name.endswith(("A_logs", "Ds", "dt_projs_bias"))
            (plain if exempt else decayed).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        # Per group of tensors a single kernel, which torch has for GPUs.
        return AdamW(groups, lr=recipe.learning_rate, fused=decayed[0].is_cuda)

    def configure_optimizers(self) -> Any:
        """AdamW with a linear warm-up and a cosine to zero, per step."""
        recipe, optimizer = self.recipe, self.optimizer()
        total = int(self.trainer.estimated_stepping_batches)
        warmup = total * recipe.warmup_epochs / recipe.epochs

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (total - warmup))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
