"""MambaMIC as steps for the native library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambamic.graph.cpu_layers import (
    Layout,
    Matrix,
    StateSpace,
    add_convolution,
    add_product,
    conv_matrix,
    edge_biases,
)
from mambamic.graph.cpu_steps import Activation, Kind, Program
from mambamic.graph.fold import (
    MambaMICBlockWeights,
    fold_conv,
    fold_mambamic_block,
    fold_merge,
    inverse,
    vector_order,
)
from mambamic.models.mambamic import N_CHUNKS, MambaMIC


def _indices(order: list[int]) -> Tensor:
    return torch.tensor(order, dtype=torch.int32)


class Block:
    """One block: C channels, chunks of d."""

    def __init__(self, weights: MambaMICBlockWeights, layout: Layout) -> None:
        half = len(weights.chunk)
        d = half // N_CHUNKS
        conv_1, conv_2, conv_3 = weights.local.convs
        self.half, self.d = half, d
        self.local_1 = edge_biases(conv_1, weights.local.scale, weights.local.shift)
        # All first outputs of the expanding convolution, then all second ones.
        self.local_2 = (
            conv_2.taps().view(9, half, 2).permute(2, 0, 1).contiguous(),
            conv_2.bias.view(half, 2).t().contiguous(),
        )
        mixing = conv_3.weight.view(half, half, 2).transpose(1, 2).reshape(half, 2 * half)
        self.local_3 = Matrix(mixing, conv_3.bias, layout)

        # The chunks lie in the network's own order, the branch's result in the one of `weights`.
        places = inverse(weights.chunk)
        self.gather = _indices([weights.gather[place] for place in places])
        self.norm = (weights.norm[0][places], weights.norm[1][places])
        self.order = _indices(weights.chunk)
        self.state_space = StateSpace(weights.state_space, layout)
        filtered = weights.filtered
        self.filtered = len(filtered)
        feed = [*filtered, *(o for o in range(d) if o not in filtered)]
        self.feed = Matrix(weights.feed.weight.flatten(1)[feed], weights.feed.bias[feed], layout)
        self.filter = (weights.filter.taps(), weights.filter.bias)
        at = inverse(feed)
        self.recombined = _indices(
            [
                half + chunk * self.filtered + at[o] if o in filtered else chunk * d + at[o]
                for chunk in range(N_CHUNKS)
                for o in range(d)
            ]
        )
        # x + feed-forward, plus skip_scale times x.
        self.factor = 1.0 + weights.skip_scale
        self.interaction = (weights.interaction.taps(), weights.interaction.bias)
        self.attention = weights.attention
        quarter = half // 2
        runs = [u + (quarter if u >= quarter else 0) for u in range(half)]
        assert weights.out_a == runs
        assert weights.out_b == [place + quarter for place in runs]

    def add(self, program: Program, x: Tensor, scale: Tensor | None, out: str) -> Tensor:
        """Append the steps of the block.

        Args:
            program: What they are added to.
            x: (B, H, H, C).
            scale: (B, C) factors that the previous block's attention found, if any.
            out: The name of the result's buffer.

        Returns:
            (B, H, H, C), still without the factors of its attention, which lie in the buffer
            ``scale``.
        """
        self._add_branches(program, x, scale)
        global_ = self._add_feed(program, x.shape)
        return self._add_interaction(program, x.shape, global_, out)

    def _add_branches(self, program: Program, x: Tensor, scale: Tensor | None) -> None:
        shape, channels, half = x.shape[:3], x.shape[3], self.half
        normed = program.buffer("normed", *shape, half)
        program.add(
            Kind.LAYER_NORM,
            shape,
            input=x[..., half:],
            out=normed,
            weight=self.norm[0],
            bias=self.norm[1],
            scale=None if scale is None else scale[:, half:],
            index=self.gather,
            channels=half,
            in_pitch=channels,
            out_pitch=half,
            scale_pitch=channels,
        )
        local = program.buffer("local_1", *shape, half)
        program.add(
            Kind.DEPTHWISE,
            shape,
            waits=False,
            input=x,
            out=local,
            weight=self.local_1[0],
            bias=self.local_1[1],
            scale=scale,
            scale_pitch=channels,
            edges=1,
            channels=half,
            in_pitch=channels,
            out_pitch=half,
            activation=Activation.RELU,
        )
        self.state_space.add_input(program, normed, N_CHUNKS)
        wide = program.buffer("local_2", *shape, channels)
        program.add(
            Kind.DEPTHWISE,
            shape,
            waits=False,
            input=local,
            out=wide,
            weight=self.local_2[0],
            bias=self.local_2[1],
            multiplier=2,
            channels=half,
            in_pitch=half,
            out_pitch=channels,
            activation=Activation.RELU,
        )
        self.state_space.add_convolution(program, shape, N_CHUNKS)
        local = program.buffer("local", *shape, half)
        add_product(program, wide, self.local_3, local, Activation.RELU, waits=False)

    def _add_feed(self, program: Program, shape: torch.Size) -> Tensor:
        batch, height, width, _ = shape
        half, d = self.half, self.d
        gated = self.state_space.add_scan_and_gate(program, shape[:3], N_CHUNKS)
        fed = program.buffer("local_1", *shape[:3], half)
        rows = gated.view(batch, height, width * N_CHUNKS, 2 * d)
        add_product(program, rows, self.feed, fed, Activation.SILU)
        filtered = program.buffer("filtered", *shape[:3], N_CHUNKS * self.filtered)
        program.add(
            Kind.DEPTHWISE,
            shape,
            input=fed,
            out=filtered,
            weight=self.filter[0],
            bias=self.filter[1],
            channels=self.filtered,
            in_pitch=half,
            out_pitch=N_CHUNKS * self.filtered,
            groups=N_CHUNKS,
            in_group=d,
            out_group=self.filtered,
            activation=Activation.SILU,
        )
        global_ = program.buffer("local_2", *shape[:3], half)
        program.add(
            Kind.RECOMBINE,
            shape,
            input=fed,
            third=filtered,
            other=program.buffer("normed", *shape[:3], half),
            out=global_,
            weight=self.norm[0],
            bias=self.norm[1],
            index=self.recombined,
            order=self.order,
            factor=self.factor,
            channels=half,
            in_pitch=half,
            third_pitch=N_CHUNKS * self.filtered,
        )
        return global_

    def _add_interaction(
        self, program: Program, shape: torch.Size, global_: Tensor, name: str
    ) -> Tensor:
        batch, height, _, channels = shape
        out = program.buffer(name, *shape)
        sums = program.buffer("sums", batch, height, channels)
        program.add(
            Kind.INTERACT,
            shape,
            input=program.buffer("local", *shape[:3], self.half),
            other=global_,
            out=out,
            sums=sums,
            weight=self.interaction[0],
            bias=self.interaction[1],
            channels=self.half,
        )
        program.add(
            Kind.ATTENTION,
            shape,
            sums=sums,
            weight=self.attention,
            scale_out=program.buffer("scale", batch, channels),
            out=program.buffer("means", batch, channels),
            channels=channels,
        )
        return out


class Network:
    """The whole network's weights, from which a program is made for each shape of input."""

    def __init__(self, model: MambaMIC, layout: Layout) -> None:
        parts: list[Any] = list(model.patch_embed)
        self.stem = [conv_matrix(fold_conv(part.c, part.bn), layout) for part in parts[::2]]
        self.stages: list[tuple[list[Block], tuple[tuple[Tensor, Tensor], Matrix] | None]] = []
        order: list[int] = list(range(self.stem[1].columns))
        stages: list[Any] = list(model.layers)
        for stage in stages:
            blocks = []
            for block in stage.blocks:
                weights = fold_mambamic_block(block, order, vector_order(len(order) // 2))
                blocks.append(Block(weights, layout))
                order = weights.out_order
            merge = None
            if stage.downsample is not None:
                folded = fold_merge(stage.downsample, order)
                merge = (folded.norm, Matrix(folded.weight, None, layout))
                order = list(range(len(folded.weight)))
            self.stages.append((blocks, merge))
        self.out_order = order
        head = model.head
        self.head = Matrix(head.weight.detach()[:, order], head.bias.detach(), layout)

    def add(self, program: Program, image: Tensor) -> tuple[Tensor, Tensor]:
        """Append all steps from (B, H, H, 3), normalised.

        Returns:
            Logits (B, classes) and the features before the head, (B, C) in ``out_order``.
        """
        x = image
        for name, matrix, activation in zip(
            ("stem", "map_0"), self.stem, (Activation.GELU, Activation.NONE), strict=True
        ):
            x = add_convolution(
                program, name, x, matrix, kernel=3, stride=2, padding=1, activation=activation
            )
        scale: Tensor | None = None
        maps = 0
        for blocks, merge in self.stages:
            for block in blocks:
                maps += 1
                x = block.add(program, x, scale, f"map_{maps % 2}")
                scale = program.buffer("scale", x.shape[0], x.shape[3])
            if merge is not None:
                maps += 1
                x = add_merge(program, x, scale, *merge, f"map_{maps % 2}")
                scale = None
        batch, channels = x.shape[0], x.shape[3]
        means = program.buffer("means", batch, channels)
        logits = program.buffer("logits", batch, self.head.columns)
        add_product(program, means.view(batch, 1, 1, channels), self.head, logits)
        return logits, means


def add_merge(
    program: Program,
    x: Tensor,
    scale: Tensor | None,
    norm: tuple[Tensor, Tensor],
    matrix: Matrix,
    out: str,
) -> Tensor:
    """Append the merge of 2x2 patches: (B, H, W, C) to (B, H // 2, W // 2, 2 C)."""
    batch, in_height, in_width, channels = x.shape
    shape = (batch, in_height // 2, in_width // 2)
    patches = program.buffer("patches", *shape, 4 * channels)
    program.add(
        Kind.MERGE_NORM,
        shape,
        input=x,
        out=patches,
        weight=norm[0],
        bias=norm[1],
        scale=scale,
        scale_pitch=channels,
        in_height=in_height,
        in_width=in_width,
        channels=channels,
    )
    merged = program.buffer(out, *shape, 2 * channels)
    add_product(program, patches, matrix, merged)
    return merged
