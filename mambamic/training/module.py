"""The training step, the validation step and the optimiser, for Lightning."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mambamic.training.augment import Augmentation
from mambamic.training.recipe import Recipe, epoch_seed


class TrainingModule(pl.LightningModule):
    """A model in training, with the moving average of its weights, which is what is kept."""

    def __init__(self, model: nn.Module, augmentation: Augmentation, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.augmentation, self.recipe = model, augmentation, recipe
        average = get_ema_multi_avg_fn(recipe.ema_decay)
        # Buffers are averaged too: running statistics belong to the weights they were taken with.
        self.average = AveragedModel(model, multi_avg_fn=average, use_buffers=True)

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        """Return the loss of one batch of (B, S, S, 3) uint8 pixels and (B,) labels."""
        pixels, labels = batch
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            images = self.augmentation(pixels)
        smoothing = self.recipe.label_smoothing
        loss = F.cross_entropy(self.model(images).float(), labels, label_smoothing=smoothing)
        self.log("train_loss", loss, prog_bar=True)
        return loss

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
        self.log("val_loss", F.cross_entropy(logits, labels), batch_size=size, prog_bar=True)
        accuracy = (logits.argmax(-1) == labels).float().mean()
        self.log("val_accuracy", accuracy, batch_size=size, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW with a linear warm-up and a cosine to zero, per step."""
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
        optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate)
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
