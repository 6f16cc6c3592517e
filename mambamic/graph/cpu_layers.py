"""Layers of both networks as steps for the native library, their weights packed for its vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mambamic.graph.cpu_steps import Activation, Kind, Program
from mambamic.graph.fold import ConvWeights, StateSpaceWeights
from mambamic.kernels import cpu


@dataclass(frozen=True)
class Layout:
    """How the weights of matrix products are stored.

    Args:
        level: The instruction set, one of ``kernels.cpu.LEVELS``.
        dtype: float32, or bfloat16 where ``kernels.cpu.has_bfloat16``.
    """

    level: str
    dtype: torch.dtype

    def pack(self, weight: Tensor) -> Tensor:
        """Bring (N, K) into the order in which the kernels read it, zeros added.

        Returns:
            (N / lanes, K, lanes), or (N / 16, K / 32, 16, 16, 2) in bfloat16: pairs of K.
        """
        columns, depth = weight.shape
        half = self.dtype == torch.bfloat16
        lanes, steps = (16, 32) if half else (cpu.lanes(self.level), 1)
        full = weight.new_zeros(-(-columns // lanes) * lanes, -(-depth // steps) * steps)
        full[:columns, :depth] = weight
        if half:
            pairs = full.view(-1, 16, full.shape[1] // 32, 16, 2).permute(0, 2, 3, 1, 4)
            return pairs.to(torch.bfloat16, memory_format=torch.contiguous_format)
        return full.view(-1, lanes, depth).transpose(1, 2).contiguous()


class Matrix:
    """A product's weight and bias, packed.

    Args:
        weight: (N, K).
        bias: (N,), or None for zeros.
        layout: Of the weight.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, layout: Layout) -> None:
        self.columns = len(weight)
        self.weight = layout.pack(weight)
        self.bias = weight.new_zeros(-(-self.columns // 16) * 16)
        if bias is not None:
            self.bias[: self.columns] = bias

    @property
    def half(self) -> bool:
        """Whether the weight is bfloat16."""
        return self.weight.dtype == torch.bfloat16


def conv_matrix(conv: ConvWeights, layout: Layout) -> Matrix:
    """Pack a dense convolution."""
    return Matrix(conv.matrix(), conv.bias, layout)


def edge_biases(conv: ConvWeights, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Fold a scale and a shift that stand before a zero-padded depthwise 3x3 convolution.

    Args:
        conv: The convolution.
        scale: (C,), of its input inside the image.
        shift: (C,), likewise.

    Returns:
        (9, C) weights, and (16, C) biases: which neighbours a pixel has, 1 for above, 2 for
        below, 4 for left, 8 for right, decides how much of the shift it sees.
    """
    taps = conv.taps()
    biases = []
    for neighbours in range(16):
        rows = [bool(neighbours & 1), True, bool(neighbours & 2)]
        columns = [bool(neighbours & 4), True, bool(neighbours & 8)]
        inside = [3 * y + x for y in range(3) for x in range(3) if rows[y] and columns[x]]
        biases.append(conv.bias + shift * taps[inside].sum(0))
    return (taps * scale).contiguous(), torch.stack(biases)


class StateSpace:
    """The gated scan's parameters, laid out for the native library."""

    def __init__(self, weights: StateSpaceWeights, layout: Layout) -> None:
        inner = len(weights.conv.bias)
        self.inner = inner
        self.x = Matrix(weights.in_proj[:inner], None, layout)
        self.gate = Matrix(weights.in_proj[inner:], None, layout)
        self.taps, self.bias = weights.conv.taps(), weights.conv.bias
        # Each direction with its reverse: rows, then columns.
        self.projections = [
            Matrix(weights.x_proj[first::2].flatten(0, 1), None, layout) for first in (0, 1)
        ]
        self.both_projections = torch.stack([matrix.weight for matrix in self.projections])
        self.norm = weights.norm
        self._scan = {
            "dt_weight": weights.dt_weight.transpose(1, 2).contiguous(),
            "dt_bias": weights.dt_bias.contiguous(),
            "A": weights.A.transpose(1, 2).contiguous(),
            "skip": weights.skip.contiguous(),
        }

    def add_input(self, program: Program, x: Tensor, groups: int) -> None:
        """Append the products with in_proj: ``x`` is (B, H, W, groups * d_model), dense."""
        batch, height, width, channels = x.shape
        depth = channels // groups
        for name, matrix, activation in (
            ("scanned", self.x, Activation.NONE),
            ("gate", self.gate, Activation.SILU),
        ):
            out = program.buffer(name, batch, height, width, groups * self.inner)
            add_product(
                program,
                x.view(batch, height, width * groups, depth),
                matrix,
                out,
                activation,
                waits=name == "scanned",
            )

    def add_convolution(self, program: Program, shape: Sequence[int], groups: int) -> None:
        """Append the depthwise convolution; ``shape`` is (B, H, W)."""
        channels = groups * self.inner
        program.add(
            Kind.DEPTHWISE,
            shape,
            input=program.buffer("scanned", *shape, channels),
            out=program.buffer("u", *shape, channels),
            weight=self.taps,
            bias=self.bias,
            channels=self.inner,
            in_pitch=channels,
            out_pitch=channels,
            groups=groups,
            in_group=self.inner,
            out_group=self.inner,
            activation=Activation.SILU,
        )

    def add_scan_and_gate(self, program: Program, shape: Sequence[int], groups: int) -> Tensor:
        """Append x_proj, the scan, its norm and the gate; return (B, H, W, groups * D)."""
        batch, height, width = shape
        u = program.buffer("u", batch, height, width * groups, self.inner)
        # What is not read any more gives its memory to the next result.
        y = program.buffer("scanned", batch, height, width, groups * self.inner)
        if torch.get_num_threads() <= batch * groups:
            program.add(
                Kind.GROUP_SCAN,
                shape,
                scan=program.scan(batch, height, width, groups, x=u, y=y, **self._scan),
                weight=self.both_projections,
                bias=self.projections[0].bias,
                channels=self.inner,
                columns=self.projections[0].columns,
                panels=self.both_projections[0].nbytes // 4,
                half=self.projections[0].half,
            )
        else:
            self._add_scan(program, u, y, shape, groups)
        # Not in place: loads that follow masked stores to the same line wait for these.
        gated = program.buffer("u", *y.shape)
        program.add(
            Kind.GATE,
            u.shape,
            input=y,
            other=program.buffer("gate", *y.shape),
            out=gated,
            weight=self.norm[0],
            bias=self.norm[1],
            channels=self.inner,
        )
        return gated

    def _add_scan(
        self, program: Program, u: Tensor, y: Tensor, shape: Sequence[int], groups: int
    ) -> None:
        """Append the projections and the scan apart: all threads share the channels of a group."""
        batch, height, width = shape
        columns = self.projections[0].columns
        projections = program.buffer("projections", batch, groups, 2, height * width, columns)
        for transposed, matrix in enumerate(self.projections):
            add_product(
                program,
                u,
                matrix,
                projections[:, :, transposed],
                waits=not transposed,
                groups=groups,
                out_group=2 * height * width * columns,
                transposed=transposed,
            )
        scan = program.scan(
            batch, height, width, groups, x=u, projections=projections, y=y, **self._scan
        )
        program.add(Kind.SCAN, shape, scan=scan)


def add_product(
    program: Program,
    x: Tensor,
    matrix: Matrix,
    out: Tensor,
    activation: Activation = Activation.NONE,
    *,
    waits: bool = True,
    **order: int,
) -> None:
    """Append ``out = activation(x @ weight + bias)`` over the last dimension of (B, H, W, K).

    Args:
        program: What it is added to.
        x: (B, H, W, K).
        matrix: The packed weight.
        out: Where the rows of N columns go, one after the other.
        activation: Of the output.
        waits: As in ``Program.add``.
        **order: Fields that give the rows another order.
    """
    program.add(
        Kind.PRODUCT,
        x.shape,
        waits=waits,
        input=x,
        out=out,
        weight=matrix.weight,
        bias=matrix.bias,
        channels=x.shape[3],
        columns=matrix.columns,
        in_pitch=x.shape[3],
        out_pitch=matrix.columns,
        activation=activation,
        half=matrix.half,
        **order,
    )


def add_convolution(
    program: Program,
    name: str,
    x: Tensor,
    matrix: Matrix,
    *,
    kernel: int,
    stride: int,
    padding: int,
    activation: Activation = Activation.NONE,
    channels: int | None = None,
    affine: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    waits: bool = True,
) -> Tensor:
    """Append a dense convolution of (B, H, W, C), or of its first ``channels`` channels.

    Args:
        program: What it is added to.
        name: Of the buffer that is returned.
        x: The input.
        matrix: The packed kernel.
        kernel: Its height and width.
        stride: From one output to the next.
        padding: Zeros around the input.
        activation: Of the output.
        channels: Of the input; all by default.
        affine: A scale and a shift of the input inside the image, (channels,) each.
        waits: As in ``Program.add``.
    """
    batch, in_height, in_width, pitch = x.shape
    height, width = ((size + 2 * padding - kernel) // stride + 1 for size in (in_height, in_width))
    out = program.buffer(name, batch, height, width, matrix.columns)
    program.add(
        Kind.CONVOLUTION,
        out.shape,
        waits=waits,
        input=x,
        out=out,
        weight=matrix.weight,
        bias=matrix.bias,
        scale=affine[0],
        shift=affine[1],
        in_height=in_height,
        in_width=in_width,
        channels=pitch if channels is None else channels,
        columns=matrix.columns,
        in_pitch=pitch,
        out_pitch=matrix.columns,
        kernel=kernel,
        stride=stride,
        padding=padding,
        activation=activation,
        half=matrix.half,
    )
    return out
