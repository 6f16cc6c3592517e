"""MedMamba as steps for the native library."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mambamic.graph.cpu_layers import (
    Layout,
    Matrix,
    StateSpace,
    add_convolution,
    add_product,
    conv_matrix,
)
from mambamic.graph.cpu_mambamic import add_merge
from mambamic.graph.cpu_steps import Activation, Kind, Program
from mambamic.graph.fold import (
    MedMambaBlockWeights,
    fold_conv,
    fold_medmamba_block,
    fold_merge,
)
from mambamic.models.medmamba import MedMamba


class Block:
    """One block of C channels."""

    def __init__(self, weights: MedMambaBlockWeights, layout: Layout) -> None:
        self.half = len(weights.norm[0])
        self.affine = (weights.local.scale, weights.local.shift)
        self.convs = [conv_matrix(conv, layout) for conv in weights.local.convs]
        self.norm = weights.norm
        self.state_space = StateSpace(weights.state_space, layout)
        self.out = Matrix(weights.out_proj, None, layout)

    def add(self, program: Program, x: Tensor, out: str) -> Tensor:
        """Append the steps of the block, from (B, H, W, C) to the same shape in buffer ``out``."""
        shape, channels, half = x.shape[:3], x.shape[3], self.half
        normed = program.buffer("normed", *shape, half)
        program.add(
            Kind.LAYER_NORM,
            shape,
            input=x[..., half:],
            out=normed,
            weight=self.norm[0],
            bias=self.norm[1],
            channels=half,
            in_pitch=channels,
            out_pitch=half,
        )
        local = self._add_convolution(program, "local_1", x, 0, self.affine)
        self.state_space.add_input(program, normed, 1)
        local = self._add_convolution(program, "local_2", local, 1, (None, None))
        self.state_space.add_convolution(program, shape, 1)
        left = program.buffer("local", *shape, half)
        add_product(program, local, self.convs[2], left, Activation.RELU, waits=False)
        gated = self.state_space.add_scan_and_gate(program, shape, 1)
        right = program.buffer("global", *shape, half)
        add_product(program, gated, self.out, right)
        result = program.buffer(out, *x.shape)
        program.add(
            Kind.INTERLEAVE,
            shape,
            input=x,
            other=left,
            third=right,
            out=result,
            channels=channels,
        )
        return result

    def _add_convolution(
        self,
        program: Program,
        name: str,
        x: Tensor,
        index: int,
        affine: tuple[Tensor, Tensor] | tuple[None, None],
    ) -> Tensor:
        return add_convolution(
            program,
            name,
            x,
            self.convs[index],
            kernel=3,
            stride=1,
            padding=1,
            activation=Activation.RELU,
            channels=self.half,
            affine=affine,
            waits=False,
        )


class Network:
    """The whole network's weights, from which a program is made for each shape of input."""

    def __init__(self, model: MedMamba, layout: Layout) -> None:
        self.stem = conv_matrix(fold_conv(model.patch_embed.proj), layout)
        norm = model.patch_embed.norm
        self.norm = (norm.weight.detach().float(), norm.bias.detach().float())
        self.stages: list[tuple[list[Block], tuple[tuple[Tensor, Tensor], Matrix] | None]] = []
        stages: list[Any] = list(model.layers)
        for stage in stages:
            blocks = [Block(fold_medmamba_block(block), layout) for block in stage.blocks]
            merge = None
            if stage.downsample is not None:
                channels = stage.downsample.reduction.in_features // 4
                folded = fold_merge(stage.downsample, range(channels))
                merge = (folded.norm, Matrix(folded.weight, None, layout))
            self.stages.append((blocks, merge))
        self.out_order = list(range(model.head.in_features))
        self.head = Matrix(model.head.weight.detach(), model.head.bias.detach(), layout)

    def add(self, program: Program, image: Tensor) -> tuple[Tensor, Tensor]:
        """Append all steps from (B, H, W, 3), normalised.

        Returns:
            Logits (B, classes) and the features before the head, (B, C) in ``out_order``.
        """
        x = add_convolution(program, "map_0", image, self.stem, kernel=4, stride=4, padding=0)
        program.add(
            Kind.LAYER_NORM,
            x.shape,
            input=x,
            out=x,
            weight=self.norm[0],
            bias=self.norm[1],
            channels=x.shape[3],
            in_pitch=x.shape[3],
            out_pitch=x.shape[3],
        )
        maps = 0
        for blocks, merge in self.stages:
            for block in blocks:
                maps += 1
                x = block.add(program, x, f"map_{maps % 2}")
            if merge is not None:
                maps += 1
                x = add_merge(program, x, None, *merge, f"map_{maps % 2}")
        batch, channels = x.shape[0], x.shape[3]
        means = program.buffer("means", batch, channels)
        program.add(Kind.MEAN, x.shape, input=x, out=means, channels=channels)
        logits = program.buffer("logits", batch, self.head.columns)
        add_product(program, means.view(batch, 1, 1, channels), self.head, logits)
        return logits, means
