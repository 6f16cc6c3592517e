"""The model card that a training run writes beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mambamic.checkpoint import CARD_FILE, CONFIG_FILE, Checkpoint, write_file
from mambamic.config import Config
from mambamic.training.recipe import Recipe


def model_card(config: Config, recipe: Recipe) -> str:
    """Return a model card in Markdown: what it is, from what, how, how good, and its limits."""
    metrics = config.metrics
    stated = recipe.as_dict()
    stated |= stated.pop("augmentation")
    settings = "\n".join(f"| {name} | {value} |" for name, value in stated.items())
    init = metrics.get("init", "random weights")
    taught = ", ".join(["the labels", *metrics.get("teachers", [])])
    classes = ", ".join(config.classes)
    said = "\n".join(_said(config))
    resize = {"stretch": "the whole image", "shorter_side": "the central square"}[config.resize]
    return f"""# {config.architecture}, {len(config.classes)} classes

For research use only: not a medical device, not for diagnosis.

- Classes: {classes}
- Input: {resize} resized to {config.input_size} x {config.input_size} ({config.interpolation})
{said}

## Training

{metrics["train_images"]} images, {metrics["epochs"]} epochs, {metrics["minutes"]} minutes on
{metrics["device"]} ({metrics["images_per_second"]} images per second), seed {metrics["seed"]},
torch {metrics["torch"]}, weights kept from epoch {metrics["best_epoch"]}.
{_ended(metrics)}
Started from: {init}
Learned from: {taught}

| setting | value |
| --- | --- |
{settings}

## Results

| split | images | accuracy |
| --- | --- | --- |
| validation (used to choose the epoch) | {metrics["val_images"]} | {metrics["val_accuracy"]:.4f} |
"""


def restate(checkpoint: Checkpoint, said: Mapping[str, Any]) -> Checkpoint:
    """Change what a checkpoint and its card state of the images and the licence, and no more.

    A temperature, a detector, and what someone wrote into the card by hand stay.

    Args:
        checkpoint: A run's result.
        said: New values of some of the config's ``mpp``, ``licence`` and ``training_data``.

    Returns:
        The checkpoint as it is now.

    Raises:
        CheckpointError: The folder cannot be written to.
    """
    config = replace(checkpoint.config, **said)
    if config == checkpoint.config:
        return checkpoint
    card = before = checkpoint.card()
    for old, new in zip(_said(checkpoint.config), _said(config), strict=True):
        card = card.replace(f"\n{old}\n", f"\n{new}\n")
    # The config last: where that fails, the same call finds something to do again.
    if card != before:
        write_file(checkpoint, CARD_FILE, card.encode())
    write_file(checkpoint, CONFIG_FILE, config.to_json().encode())
    return Checkpoint(checkpoint.path, config)


def _ended(metrics: Mapping[str, Any]) -> str:
    reason = metrics.get("ended_early")
    return "" if reason is None else f"\nTraining ended before its time: {reason}.\n"


def _said(config: Config) -> tuple[str, ...]:
    mpp = "unknown" if config.mpp is None else config.mpp
    return (
        f"- Microns per pixel of the tiles: {mpp}",
        f"- Training data: {config.training_data}",
        f"- Licence: {config.licence}",
    )
