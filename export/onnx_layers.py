"""Layers of both networks as ONNX nodes, from the weights that ``graph.fold`` gives.

Maps are (B, C, H, W) for convolutions; where a layer works on channels they are (L, B, C) with
L = H * W: positions first, as the scan takes them.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mambamic.export.onnx_graph import Array, Graph, integers
from mambamic.export.onnx_scan import DOMAIN, NAME, block_length
from mambamic.graph.fold import ConvWeights, LocalWeights, MergeWeights, StateSpaceWeights

_EPSILON = 1e-5  # torch's of a LayerNorm
# Groups of fewer channels lie side by side: a pass over short rows costs more than masked ones.
_SIDE_BY_SIDE_BELOW = 64


def array(tensor: Tensor) -> NDArray[np.float32]:
    """Return a tensor of weights as NumPy's."""
    values: NDArray[np.float32] = tensor.detach().float().numpy()
    return values


def per_channel(tensor: Tensor) -> NDArray[np.float32]:
    """Return (C,) as (C, 1, 1), for (B, C, H, W)."""
    return array(tensor).reshape(-1, 1, 1)


def silu(graph: Graph, x: str) -> str:
    """Append x * sigmoid(x)."""
    return graph("Mul", x, graph("Sigmoid", x))


def convolution(
    graph: Graph, x: str, conv: ConvWeights, *, stride: int = 1, padding: int = 0, groups: int = 1
) -> str:
    """Append a convolution of (B, C, H, W)."""
    return graph(
        "Conv",
        x,
        array(conv.weight),
        array(conv.bias),
        kernel_shape=list(conv.weight.shape[2:]),
        strides=[stride, stride],
        pads=[padding] * 4,
        group=groups,
    )


def depthwise(graph: Graph, x: str, conv: ConvWeights, copies: int = 1) -> str:
    """Append a depthwise 3x3 convolution, its weights the same for ``copies`` runs of channels."""
    tiled = ConvWeights(conv.weight.repeat(copies, 1, 1, 1), conv.bias.repeat(copies))
    return convolution(graph, x, tiled, padding=1, groups=len(tiled.bias))


def layer_norm(graph: Graph, x: str, norm: tuple[Tensor, Tensor]) -> str:
    """Append a normalisation of the last axis."""
    scale, shift = (array(values) for values in norm)
    return graph("LayerNormalization", x, scale, shift, axis=-1, epsilon=_EPSILON)


def affine(graph: Graph, x: str, local: LocalWeights) -> str:
    """Append the first normalisation of a local branch: it stands before a zero-padded layer."""
    return graph("Add", graph("Mul", x, per_channel(local.scale)), per_channel(local.shift))


def positions_first(graph: Graph, x: str, channels: int, length: int) -> str:
    """Append what brings (B, C, H, W) to (L, B, C)."""
    return graph.transpose(graph.reshape(x, 0, channels, length), 2, 0, 1)


def channels_first(graph: Graph, x: str, channels: int, height: int, width: int) -> str:
    """Append what brings (L, B, C), or the same with C split, to (B, C, H, W)."""
    moved = graph.transpose(graph.reshape(x, height * width, -1, channels), 1, 2, 0)
    return graph.reshape(moved, 0, channels, height, width)


def merge(graph: Graph, x: str, weights: MergeWeights, height: int, width: int) -> str:
    """Append the merge of 2x2 patches: (B, C, H, W) to (B, 2 C, H // 2, W // 2)."""
    wide, phases = weights.weight.shape
    channels, rows, columns = phases // 4, height // 2, width // 2
    if height % 2 or width % 2:
        x = graph("Slice", x, integers(0, 0), integers(2 * rows, 2 * columns), integers(2, 3))
    # By column, then by row.
    patches = graph.transpose(graph.reshape(x, -1, channels, rows, 2, columns, 2), 2, 4, 0, 5, 3, 1)
    normed = layer_norm(graph, graph.reshape(patches, rows * columns, -1, phases), weights.norm)
    return channels_first(graph, _linear(graph, normed, weights.weight), wide, rows, columns)


def _linear(graph: Graph, x: str, weight: Tensor) -> str:
    """Append a product of the last axis with (N, K)."""
    return graph("MatMul", x, array(weight).T)


class GatedScan:
    """The gated scan on groups of channels that share its weights.

    Args:
        weights: Of one group.
        groups: How many there are.
    """

    def __init__(self, weights: StateSpaceWeights, groups: int) -> None:
        self._weights, self._groups = weights, groups
        self._directions, self._inner, self._rank = weights.dt_weight.shape
        self._model = weights.in_proj.shape[1]
        self._states = weights.A.shape[2]
        self._together = groups if self._inner < _SIDE_BY_SIDE_BELOW else 1

    def add(self, graph: Graph, normed: str, normed_first: str, height: int, width: int) -> str:
        """Append the layer up to its gate.

        Args:
            graph: What is added to.
            normed: (L, B, groups * d_model).
            normed_first: The same as (B, groups * d_model, L).
            height: H.
            width: W.

        Returns:
            (L, B, groups, D).
        """
        weights, groups, inner = self._weights, self._groups, self._inner
        length = height * width
        by_group = graph.reshape(normed, length, -1, groups, self._model)
        gate = silu(graph, _linear(graph, by_group, weights.in_proj[inner:]))
        first = graph.reshape(normed_first, -1, groups, self._model, length)
        x = graph("MatMul", array(weights.in_proj[:inner]), first)
        x = graph.reshape(x, -1, groups * inner, height, width)
        x = silu(graph, depthwise(graph, x, weights.conv, groups))
        x = positions_first(graph, x, groups * inner, length)
        y = self._scan(graph, x, height, width)
        normed = layer_norm(graph, graph.reshape(y, length, -1, groups, inner), weights.norm)
        return graph("Mul", normed, gate)

    def _scan(self, graph: Graph, x: str, height: int, width: int) -> str:
        """Append the scan in four directions and their sum: (L, B, groups * D) to the same."""
        weights, inner, states, together = self._weights, self._inner, self._states, self._together
        directions, length, wide = len(weights.A), height * width, together * inner
        low, at_b, at_c = weights.x_proj.split([self._rank, states, states], dim=1)
        reading = _readings(height, width)
        block = block_length(length, directions * self._groups * states * inner)
        rows = graph.reshape(x, 1, -1, inner)  # [1, L B groups, D]

        def along(value: str, *shape: int, places: NDArray[np.int64] = reading) -> str:
            # In the order of the map, to that of the scans, in blocks.
            maps = directions if places is reading else 1
            flat = graph.reshape(value, maps * length, -1, math.prod(shape))
            read = graph("Gather", flat, places)
            return graph.reshape(read, length // block, block, directions, -1, *shape)

        step = graph("MatMul", rows, _transposed(low))
        step = graph("MatMul", step, _transposed(weights.dt_weight))
        step = graph("Add", step, array(weights.dt_bias)[:, np.newaxis])
        b = graph("MatMul", rows, _transposed(at_b))
        b = graph.transpose(graph.reshape(b, -1, together, states), 0, 2, 1)
        c = graph("MatMul", rows, _transposed(at_c))
        y = graph(
            NAME,
            along(x, 1, wide, places=reading % length),
            along(step, 1, wide),
            along(b, states, together),
            along(c, together, states),
            np.tile(array(weights.A).transpose(0, 2, 1)[:, np.newaxis], together),
            np.kron(np.eye(together), np.ones((1, inner))).astype(np.float32),
            domain=DOMAIN,
        )
        back = np.argsort(reading.reshape(-1)).reshape(directions, length)
        y = graph("Gather", graph.reshape(y, length * directions, -1, self._groups * inner), back)
        y = graph("ReduceSum", y, integers(0), keepdims=0)
        skip = np.tile(array(weights.skip).sum(0), self._groups)
        return graph("Add", y, graph("Mul", x, skip))


def _transposed(weight: Tensor) -> Array:
    """Return (K, N, D) as (K, D, N)."""
    turned: Array = array(weight).transpose(0, 2, 1)
    return turned


def _readings(height: int, width: int) -> NDArray[np.int64]:
    """Return (L, K): the position that each direction reads at each time, counted through K maps.

    Row by row, column by column, and both backwards.
    """
    rows = np.arange(height * width)
    columns = rows.reshape(height, width).T.reshape(-1)
    orders = [rows, columns, rows[::-1], columns[::-1]]
    return np.stack([k * rows.size + order for k, order in enumerate(orders)], axis=1)
