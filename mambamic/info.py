"""What a network has and does for one image: parameters, operations, activation memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mambamic.benchmark.floors import count
from mambamic.models.mambamic import GlobalBranch, MambaMIC
from mambamic.models.medmamba import MedMamba

_BATCHES = (2, 3)  # batch normalisation of a single position needs two images to train


@dataclass(frozen=True)
class Part:
    """The stem, a stage with the merge behind it, or the head.

    Args:
        name: Which.
        output: (H, W, C) of what it passes on; (C,) at the end.
        parameters: As used.
        multiply_adds: Of convolutions and matrix products, forward.
        state_updates: Of the scans, forward.
        output_bytes: Of what it passes on, in float32.
        training_bytes: Of what each image more keeps for the backward pass, in float32 on a CPU.
    """

    name: str
    output: tuple[int, ...]
    parameters: int
    multiply_adds: int
    state_updates: int
    output_bytes: int
    training_bytes: int


@dataclass(frozen=True)
class Info:
    """What a network has and does for one image.

    Args:
        input_size: Side of the image in pixels.
        num_classes: Of the head.
        parameters: As used.
        parameters_published: With the tensors that the published code allocates and never uses.
        parts: In their order.
    """

    input_size: int
    num_classes: int
    parameters: int
    parameters_published: int
    parts: tuple[Part, ...]

    @property
    def multiply_adds(self) -> int:
        """Of convolutions and matrix products, forward."""
        return sum(part.multiply_adds for part in self.parts)

    @property
    def state_updates(self) -> int:
        """Of the scans, forward."""
        return sum(part.state_updates for part in self.parts)

    @property
    def training_bytes(self) -> int:
        """Of what is kept for the backward pass, in float32 on a CPU."""
        return sum(part.training_bytes for part in self.parts)

    def as_json(self) -> dict[str, Any]:
        """Return it as an object that JSON can hold, sums included."""
        sums = ("multiply_adds", "state_updates", "training_bytes")
        return asdict(self) | {name: getattr(self, name) for name in sums}


def unused_parameters(model: MambaMIC | MedMamba) -> int:
    """Count what the published code allocates and never uses: ``pvm_layer.proj``, ``out_proj``."""
    total = 0
    for module in model.modules():
        if isinstance(module, GlobalBranch):
            dim, scan = module.norm.normalized_shape[0], module.mamba
            total += dim * dim + dim + scan.d_inner * scan.d_model
    return total


def examine(model: MambaMIC | MedMamba, input_size: int = 224) -> Info:
    """Count what a network has and does for one image, by running it on blank ones.

    Args:
        model: On the CPU; a copy of it is run.
        input_size: Side of the image in pixels.

    Raises:
        ShapeError: The network takes no image of this size.
    """
    model = copy.deepcopy(model).requires_grad_(True)
    images = torch.zeros(max(_BATCHES), 3, input_size, input_size)
    # What does not grow with the batch belongs to a step, not to an image.
    fewer, more = (_training_bytes(model.train(), images[:batch]) for batch in _BATCHES)
    given = _inputs(model.eval(), images[:1])
    modules = _parts(model)
    following = [*list(given.values())[1:], torch.empty(1, model.head.out_features)]
    parts = []
    for (name, module), result in zip(modules.items(), following, strict=True):
        work = count(module, given[name])
        parts.append(
            Part(
                name=name,
                output=tuple(result.shape[1:]),
                parameters=_parameters(module),
                multiply_adds=work.flops // 2,
                state_updates=work.state_updates,
                output_bytes=result.numel() * 4,
                training_bytes=more[name] - fewer[name],
            )
        )
    used = _parameters(model)
    published = used + unused_parameters(model)
    return Info(input_size, model.head.out_features, used, published, tuple(parts))


def _parts(model: MambaMIC | MedMamba) -> dict[str, nn.Module]:
    stages = {f"stage {number}": stage for number, stage in enumerate(model.layers, 1)}
    return {"stem": model.patch_embed, **stages, "head": model.head}


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def _before_each(model: MambaMIC | MedMamba, call: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call something with the name and the input of each part when its turn comes."""

    def hook(name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        call(name, args[0])

    handles = [
        module.register_forward_pre_hook(partial(hook, name))
        for name, module in _parts(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _inputs(model: MambaMIC | MedMamba, image: Tensor) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = {}
    with torch.inference_mode(), _before_each(model, inputs.__setitem__):
        model(image)
    return inputs


def _training_bytes(model: MambaMIC | MedMamba, images: Tensor) -> dict[str, int]:
    """Measure what a training step keeps for its backward pass, part by part."""
    kept = dict.fromkeys(_parts(model), 0)
    current = [next(iter(kept))]
    # Weights are there anyhow; and what several operations keep is there once.
    seen = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())
    }

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept[current[0]] += storage.nbytes()
        return tensor

    def enter(name: str, _given: Tensor) -> None:
        current[0] = name

    with (
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        _before_each(model, enter),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        logits = model(images)
    # Until here the graph held on to all of it, so that no address was given out twice.
    del logits
    return kept


def lines(info: Info, title: str) -> list[str]:
    """Return it as lines of text."""
    unused = info.parameters_published - info.parameters
    parameters = f"parameters  {info.parameters:,}"
    if unused:
        parameters += (
            f" used; {info.parameters_published:,} as published, {unused:,} of which it never uses"
        )
    size = f"{info.input_size} x {info.input_size}"
    rows = [
        ("", "output", "parameters", "multiply-adds", "state updates", "output", "for training"),
        *(
            (
                part.name,
                " x ".join(map(str, part.output)),
                f"{part.parameters:,}",
                _millions(part.multiply_adds),
                _millions(part.state_updates),
                _mebibytes(part.output_bytes),
                _mebibytes(part.training_bytes),
            )
            for part in info.parts
        ),
        (
            "all", "", f"{info.parameters:,}", _millions(info.multiply_adds),
            _millions(info.state_updates), "", _mebibytes(info.training_bytes),
        ),
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [
        f"{title}, {info.num_classes} classes, one image of {size} pixels",
        parameters,
        "",
        *(line.rstrip() for line in table),
        "",
        "stages end with the merge to the next. multiply-adds: convolutions and matrix products,",
        "forward; a state update of the scans is two more and an exponential. for training: what",
        "is kept for the backward pass, in float32 on a CPU.",
    ]


def _millions(value: int) -> str:
    return f"{value / 1e6:,.1f} M"


def _mebibytes(value: int) -> str:
    return f"{value / 2**20:,.2f} MiB"
