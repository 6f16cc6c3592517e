"""The training step, the validation step and the optimiser, for Lightning."""

from __future__ import annotations

import math
import os
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel
from torchmetrics import MeanMetric

from mambamic.errors import TrainingError
from mambamic.training.augment import Augmentation, neighbours, shrink
from mambamic.training.loss import accuracy, criterion, distillation
from mambamic.training.ranks import average_over_ranks
from mambamic.training.recipe import Recipe, epoch_seed
from mambamic.training.teachers import Teachers

GRAPHS = "MAMBAMIC_CUDA_GRAPHS"  # 0 in the environment: launch each kernel by itself
_CHECKED = 50  # steps between two looks at whether all numbers were finite
_RISE = 10  # steps after which the decay of the moving average is a half
_RANKS_APART = 7_919  # what the seeds of two processes of one run differ by


class MovingAverage(AveragedModel):
    """The moving average of a model's weights and buffers, without waiting for the device.

    Buffers are averaged too: running statistics belong to the weights they were taken with. The
    decay rises to its value with the number of steps, so that the average of a short run, or of
    the first epochs, does not hang on to where the weights began.

    Args:
        model: What is followed.
        decay: Per step, in the long run.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self._decay = decay
        self._steps: int | None = None
        # To go through all modules takes milliseconds of every step: once, when they are where
        # they are trained.
        self._moving: tuple[list[Tensor], list[Tensor]] | None = None
        self._counters: tuple[list[Tensor], list[Tensor]] = [], []

    def update_parameters(self, model: nn.Module) -> None:
        """Follow the weights: take them over the first time, and then go a part of the way."""
        if self._steps is None:  # known to the device alone where a run is resumed
            self._steps = int(self.n_averaged)
        weight = 1 - min(self._decay, self._steps / (_RISE + self._steps))
        if self._moving is None:
            self._moving, self._counters = self._pairs(model)
        with torch.no_grad():
            torch._foreach_lerp_(*self._moving, weight)
            if self._counters[0]:
                torch._foreach_copy_(*self._counters)
            self.n_averaged += 1
        self._steps += 1

    def _pairs(self, model: nn.Module) -> tuple[tuple[list[Tensor], list[Tensor]], ...]:
        """Return averages and what they follow: real numbers, and counters."""
        averages = [*self.module.parameters(), *self.module.buffers()]
        pairs = list(zip(averages, [*model.parameters(), *model.buffers()], strict=True))
        real = [pair for pair in pairs if pair[0].is_floating_point()]
        counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        return tuple(([a for a, _ in some], [c for _, c in some]) for some in (real, counters))


def capture(model: nn.Module, images: Tensor) -> None:
    """Replay a model's forward and backward pass as CUDA graphs whenever it trains.

    They are thousands of short kernels, which take the GPU less time than the host needs to
    launch them. Every later batch must have the shape of this one, or be captured anew. What the
    trial runs before the capture change is put back: running statistics and the state of the random
    numbers.
    """
    vars(model).pop("forward", None)  # that of an earlier capture, with its memory
    torch.cuda.synchronize(images.device)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    random = torch.cuda.get_rng_state(images.device)
    dtype = torch.get_autocast_dtype("cuda")
    enabled = torch.is_autocast_enabled("cuda")
    # Parameters' gradients are summed on the stream of the capture for good, which torch mentions.
    mention = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if mention is not None:
        mention(False)
    with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
        sample = torch.empty_like(images).normal_()
        try:
            torch.cuda.make_graphed_callables(model, (sample,))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise TrainingError(
                f"the training step cannot be captured as CUDA graphs ({error})",
                "a GPU and a driver that can capture it",
                f"set {GRAPHS}=0 in the environment to train without, slower",
            ) from error
    torch.cuda.set_rng_state(random, images.device)
    for buffer, before in buffers:
        buffer.copy_(before)


class TrainingModule(pl.LightningModule):
    """A model in training, with the moving average of its weights, which is what is kept.

    Args:
        model: The network.
        augmentation: Makes its inputs; knows the share of each batch that is this process's.
        recipe: The settings.
        weights: (C,), of classes in the loss.
        teachers: Whom it learns from beside the labels.
    """

    weights: Tensor | None
    failed_at: Tensor

    def __init__(
        self,
        model: nn.Module,
        augmentation: Augmentation,
        recipe: Recipe,
        weights: Tensor | None = None,
        teachers: Teachers | None = None,
    ) -> None:
        super().__init__()
        self.model, self.augmentation, self.recipe = model, augmentation, recipe
        self.teachers = teachers
        self.share = augmentation.share
        self.average = MovingAverage(model, recipe.ema_decay)
        self._trained = list(model.parameters())
        # Over all processes, whose shares may differ in size by an image. What is not a number is
        # no matter for a warning: it ends the run.
        self.val_loss, self.val_accuracy = (MeanMetric(nan_strategy="ignore") for _ in range(2))
        self.replayed = os.environ.get(GRAPHS) != "0"  # on a GPU
        self._captured: torch.Size | None = None
        self.register_buffer("weights", weights, persistent=False)
        # The first step with a number that is not finite; on the device, which nobody waits for.
        never = torch.tensor(torch.iinfo(torch.int64).max)
        self.register_buffer("failed_at", never, persistent=False)

    def loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of one batch of (B, S, S, 3) uint8 pixels and (B,) or (B, C) labels."""
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            side = self.recipe.side(self.current_epoch, pixels.shape[1])
            images = self.augmentation(shrink(pixels, side) if side < pixels.shape[1] else pixels)
            mixed = self.augmentation.strengths.mixup > 0
            images, shares = self.augmentation.blend(images) if mixed else (images, None)
            taught = self._taught(images)
        if images.is_cuda and self.replayed and images.shape != self._captured:
            capture(self.model, images)
            self._captured = images.shape
        logits = self.model(images).float()
        given = (self.recipe.label_smoothing, self.weights)
        loss = criterion(logits, labels, *given, shares)
        if shares is not None:
            loss = loss + criterion(logits, neighbours(labels), *given, 1 - shares)
        if taught is None:
            return loss
        followed = distillation(logits, taught, several=labels.ndim == 2)
        return torch.lerp(loss, followed, self.recipe.distillation)

    def _taught(self, images: Tensor) -> Tensor | None:
        """Return the probabilities of the teachers, if any."""
        if self.teachers is None or self.recipe.distillation == 0:
            return None
        return self.teachers(self.augmentation.pixels(images))

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        """Return the loss of one batch."""
        loss = self.loss(*batch)
        self.log("train_loss", loss, prog_bar=True)
        self.note(loss)
        return loss

    def on_after_backward(self) -> None:
        """Give all processes of a run the same gradients and the same running statistics."""
        if self.share.ranks > 1:
            gradients = [p.grad for p in self._trained if p.grad is not None]
            statistics = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
            average_over_ranks([*gradients, *statistics])

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        """Clip by the norm, which Lightning's own refuses to do for a fused optimiser."""
        self.note(self.clip())

    def clip(self) -> Tensor:
        """Clip the gradients and return the norm that they had."""
        limit = self.recipe.clip_norm or math.inf
        return nn.utils.clip_grad_norm_(self._trained, limit)

    def on_train_batch_end(self, _outputs: Any, _batch: Any, index: int) -> None:
        """Follow the weights with their average, and now and then look whether all went well."""
        self.average.update_parameters(self.model)
        if self.trainer.is_last_batch or (index + 1) % _CHECKED == 0:
            self._refuse_failure()

    def note(self, value: Tensor, step: int | None = None) -> None:
        """Remember the step (None: this one) of a number that is not finite, without waiting."""
        with torch.no_grad():
            at = self.global_step if step is None else step
            failed = torch.where(value.isfinite(), self.failed_at, at)
            torch.minimum(self.failed_at, failed, out=self.failed_at)

    def _refuse_failure(self) -> None:
        step = int(self.failed_at)
        if step > self.global_step:
            return
        batches = int(self.trainer.num_training_batches)
        raise TrainingError(
            f"the loss or its gradient is not a finite number since step {step % batches + 1} of "
            f"epoch {step // batches + 1} (learning_rate {self.recipe.learning_rate})",
            "finite numbers",
            "train into another --out with a smaller --learning-rate",
        )

    def on_train_epoch_start(self) -> None:
        """Make all that is random depend on the seed and the epoch alone.

        A resumed run then does what it would have done without the stop. Augmentation is drawn for
        whole batches, the same in all processes; what the model draws, each draws for itself.
        """
        batches = self.trainer.train_dataloader
        assert batches is not None
        batches.epoch = self.current_epoch
        seed = epoch_seed(self.recipe.seed, self.current_epoch)
        self.augmentation.seed(seed)
        torch.manual_seed(seed + _RANKS_APART * self.share.rank)

    def validation_step(self, batch: tuple[Tensor, Tensor], _index: int) -> None:
        """Score the averaged model on one batch."""
        pixels, labels = batch
        logits = self.average(self.augmentation(pixels)).float()
        size, loss = labels.shape[0], criterion(logits, labels)
        self.note(loss, self.global_step - 1)  # what the last step of the epoch has spoilt
        self.val_loss.update(loss, size)
        self.val_accuracy.update(accuracy(logits, labels), size)
        self.log_dict(
            {"val_loss": self.val_loss, "val_accuracy": self.val_accuracy},
            batch_size=size,
            prog_bar=True,
        )

    def on_validation_epoch_end(self) -> None:
        """Let no epoch be kept, let alone be the best, that gives no numbers."""
        self._refuse_failure()

    def optimizer(self) -> Optimizer:
        """Return the optimiser at the full rate; group 1 is what is exempt from weight decay."""
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
        kind: type[Adam] = {"adamw": AdamW, "adam": Adam}[recipe.optimiser]
        # Per group of tensors a single kernel, which torch has for GPUs.
        return kind(groups, lr=recipe.learning_rate, fused=decayed[0].is_cuda)

    def configure_optimizers(self) -> Any:
        """The optimiser with a linear warm-up and the recipe's schedule, per step."""
        recipe, optimizer = self.recipe, self.optimizer()
        total = int(self.trainer.estimated_stepping_batches)
        warmup = total * recipe.warmup_epochs / recipe.epochs

        def factor(step: int) -> float:
            if step < warmup:
                return recipe.warmup_start + (1 - recipe.warmup_start) * step / warmup
            if recipe.schedule == "constant":
                return 1.0
            along = min(1.0, (step - warmup) / (total - warmup))
            cosine = 0.5 * (1 + math.cos(math.pi * along))
            return recipe.final_rate + (1 - recipe.final_rate) * cosine

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
