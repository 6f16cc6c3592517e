"""The model card that a training run writes beside its weights."""

from __future__ import annotations

from mambamic.config import Config
from mambamic.training.recipe import Recipe


def model_card(config: Config, recipe: Recipe) -> str:
    """Return a model card in Markdown: what it is, from what, how, how good, and its limits."""
    metrics = config.metrics
    stated = recipe.as_dict()
    stated |= stated.pop("augmentation")
    settings = "\n".join(f"| {name} | {value} |" for name, value in stated.items())
    init = metrics.get("init", "random weights")
    classes = ", ".join(config.classes)
    resize = {"stretch": "the whole image", "shorter_side": "the central square"}[config.resize]
    return f"""# {config.architecture}, {len(config.classes)} classes

For research use only: not a medical device, not for diagnosis.

- Classes: {classes}
- Input: {resize} resized to {config.input_size} x {config.input_size} ({config.interpolation})
- Microns per pixel of the tiles: {config.mpp if config.mpp is not None else "unknown"}
- Training data: {config.training_data}
- Licence: {config.licence}

## Training

{metrics["train_images"]} images, {metrics["epochs"]} epochs, {metrics["minutes"]} minutes on
{metrics["device"]} ({metrics["images_per_second"]} images per second), seed {metrics["seed"]},
torch {metrics["torch"]}, weights kept from epoch {metrics["best_epoch"]}.

Started from: {init}

| setting | value |
| --- | --- |
{settings}

## Results

| split | images | accuracy |
| --- | --- | --- |
| validation (used to choose the epoch) | {metrics["val_images"]} | {metrics["val_accuracy"]:.4f} |
"""
