"""MambaMIC and MedMamba as ONNX nodes, folded as the inference graph is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mambamic.export import onnx_layers as layers
from mambamic.export.onnx_graph import Graph, integers
from mambamic.graph import fold
from mambamic.graph.fold import ConvWeights, MambaMICBlockWeights, MedMambaBlockWeights
from mambamic.models.mambamic import N_CHUNKS, MambaMIC
from mambamic.models.medmamba import MedMamba


def add_network(graph: Graph, model: MambaMIC | MedMamba, image: str, size: int) -> tuple[str, str]:
    """Append a network.

    Args:
        graph: What is added to.
        model: In evaluation mode.
        image: (B, 3, size, size), normalised.
        size: Of the image.

    Returns:
        The names of the logits (B, classes) and of the features before the head (B, C), in the
        network's own order.
    """
    mixing = isinstance(model, MambaMIC)
    x, side = _stem(graph, model, image, size)
    order: fold.Order = range(model.head.in_features)
    for number, stage in enumerate(model.layers, 1):
        modules: Any = stage
        channels = _width(modules.blocks[0])
        order = range(channels)
        for index, block in enumerate(modules.blocks):
            graph.scope(f"stage{number}/block{index + 1}")
            if mixing:
                weights = fold.fold_mambamic_block(block, order, fold.vector_order(channels // 2))
                x, order = _MambaMICBlock(weights).add(graph, x, side), weights.out_order
            else:
                x = _add_medmamba_block(graph, fold.fold_medmamba_block(block), x, side)
        if modules.downsample is not None:
            graph.scope(f"stage{number}/merge")
            x = layers.merge(graph, x, fold.fold_merge(modules.downsample, order), side, side)
            side //= 2
    graph.scope("head")
    means = graph("ReduceMean", x, integers(2, 3), keepdims=0)
    head = model.head.weight.detach()[:, list(order)]
    logits = graph("Gemm", means, layers.array(head), layers.array(model.head.bias), transB=1)
    features = graph("Gather", means, integers(*fold.inverse(order)), axis=1) if mixing else means
    return logits, features


def _width(block: Any) -> int:
    """Return how many channels a block has."""
    norm = block.pvm_layer.norm if hasattr(block, "pvm_layer") else block.ln_1
    return 2 * int(norm.weight.numel())


def _stem(graph: Graph, model: MambaMIC | MedMamba, image: str, size: int) -> tuple[str, int]:
    """Append what is before the first stage; return its map and the side of that."""
    graph.scope("patch_embed")
    embed: Any = model.patch_embed
    if isinstance(model, MambaMIC):
        first, second = (fold.fold_conv(layer.c, layer.bn) for layer in (embed[0], embed[2]))
        x = graph("Gelu", layers.convolution(graph, image, first, stride=2, padding=1))
        x = layers.convolution(graph, x, second, stride=2, padding=1)
        return x, ((size + 1) // 2 + 1) // 2
    side = size // 4
    x = layers.convolution(graph, image, fold.fold_conv(embed.proj), stride=4)
    channels = embed.proj.out_channels
    x = layers.positions_first(graph, x, channels, side * side)
    x = layers.layer_norm(graph, x, (embed.norm.weight, embed.norm.bias))
    return layers.channels_first(graph, x, channels, side, side), side


class _MambaMICBlock:
    """One block, (B, C, H, H) to the same; which channel lies where is up to its weights.

    In the global branch a chunk's channels lie so that those which its filter takes come first.
    """

    def __init__(self, weights: MambaMICBlockWeights) -> None:
        self.weights = weights
        self.half = half = len(weights.chunk)
        self.chunk = chunk = half // N_CHUNKS
        filtered = weights.filtered
        self.feed = [*filtered, *(o for o in range(chunk) if o not in filtered)]
        channels = [c * chunk + output for c in range(N_CHUNKS) for output in self.feed]
        places, at = fold.inverse(weights.chunk), fold.inverse(channels)
        self.taken = [half + weights.gather[places[channel]] for channel in channels]
        self.given = [at[channel] for channel in weights.chunk]
        stored = [places[channel] for channel in channels]
        self.norm = (weights.norm[0][stored], weights.norm[1][stored])

    def add(self, graph: Graph, x: str, side: int) -> str:
        """Append the block."""
        left = graph("Slice", x, integers(0), integers(self.half), integers(1))
        local = self._local(graph, left)
        global_ = self._global(graph, graph("Gather", x, integers(*self.taken), axis=1), side)
        return self._interaction(graph, local, global_)

    def _local(self, graph: Graph, x: str) -> str:
        local = self.weights.local
        conv_1, conv_2, conv_3 = local.convs
        x = graph("Relu", layers.depthwise(graph, layers.affine(graph, x, local), conv_1))
        # All first outputs of the expanding convolution, then all second ones: as two depthwise
        # convolutions, for which runtimes have kernels.
        wide = [
            layers.depthwise(graph, x, ConvWeights(conv_2.weight[i::2], conv_2.bias[i::2]))
            for i in (0, 1)
        ]
        x = graph("Relu", graph("Concat", *wide, axis=1))
        mixing = torch.cat([conv_3.weight[:, i::2] for i in (0, 1)], dim=1)
        return graph("Relu", layers.convolution(graph, x, ConvWeights(mixing, conv_3.bias)))

    def _global(self, graph: Graph, x: str, side: int) -> str:
        half, weights = self.half, self.weights
        normed = layers.layer_norm(
            graph, layers.positions_first(graph, x, half, side * side), self.norm
        )
        first = graph.transpose(normed, 1, 2, 0)
        state_space = replace(
            weights.state_space, in_proj=weights.state_space.in_proj[:, self.feed]
        )
        scan = layers.GatedScan(state_space, N_CHUNKS)
        fed = self._feed(graph, scan.add(graph, normed, first, side, side), side)
        skip = np.array(1 + weights.skip_scale, np.float32)  # x + feed-forward + scale x
        x = graph("Add", graph("Mul", graph.reshape(first, 0, half, side, side), skip), fed)
        x = layers.positions_first(graph, x, half, side * side)
        x = layers.layer_norm(graph, x, self.norm)
        x = layers.channels_first(graph, x, half, side, side)
        return graph("Gather", x, integers(*self.given), axis=1)

    def _feed(self, graph: Graph, gated: str, side: int) -> str:
        """Append the feed-forward: (L, B, chunks, 2 d) to (B, C / 2, W, H)."""
        weights, half, chunk = self.weights, self.half, self.chunk
        feed, filtered = weights.feed, len(weights.filtered)
        matrix = layers.array(feed.weight.flatten(1)[self.feed]).T
        x = graph("Add", graph("MatMul", gated, matrix), layers.array(feed.bias[self.feed]))
        x = graph.reshape(layers.silu(graph, x), side, side, -1, half)
        x = graph.reshape(graph.transpose(x, 2, 3, 1, 0), 0, N_CHUNKS, chunk, side * side)
        taken, rest = graph.several("Split", 2, x, integers(filtered, chunk - filtered), axis=2)
        turned = ConvWeights(weights.filter.weight.transpose(2, 3), weights.filter.bias)
        taken = graph.reshape(taken, 0, N_CHUNKS * filtered, side, side)
        taken = layers.silu(graph, layers.depthwise(graph, taken, turned, N_CHUNKS))
        taken = graph.reshape(taken, 0, N_CHUNKS, filtered, side * side)
        return graph.reshape(graph("Concat", taken, rest, axis=2), 0, half, side, side)

    def _interaction(self, graph: Graph, local: str, global_: str) -> str:
        weights, quarter = self.weights, self.half // 2
        of_local = graph("Relu", layers.depthwise(graph, local, weights.interaction))
        of_global = graph("Gelu", layers.depthwise(graph, global_, weights.interaction))
        a = graph("Mul", graph("Sigmoid", of_local), global_)
        b = graph("Mul", graph("Sigmoid", of_global), local)
        halves = [graph.several("Split", 2, x, integers(quarter, quarter), axis=1) for x in (a, b)]
        x = graph("Concat", halves[0][0], halves[1][0], halves[0][1], halves[1][1], axis=1)
        mean = graph("ReduceMean", x, integers(2, 3))
        return graph(
            "Mul", x, graph("Sigmoid", graph("Mul", mean, layers.per_channel(weights.attention)))
        )


def _add_medmamba_block(graph: Graph, weights: MedMambaBlockWeights, x: str, side: int) -> str:
    """Append one block, (B, C, H, H) to the same."""
    half = len(weights.norm[0])
    left, right = graph.several("Split", 2, x, integers(half, half), axis=1)
    conv_1, conv_2, conv_3 = weights.local.convs
    left = layers.affine(graph, left, weights.local)
    for conv, padding in ((conv_1, 1), (conv_2, 1), (conv_3, 0)):
        left = graph("Relu", layers.convolution(graph, left, conv, padding=padding))
    right = layers.positions_first(graph, right, half, side * side)
    normed = layers.layer_norm(graph, right, weights.norm)
    scan = layers.GatedScan(weights.state_space, 1)
    gated = scan.add(graph, normed, graph.transpose(normed, 1, 2, 0), side, side)
    right = graph("MatMul", gated, layers.array(weights.out_proj).T)
    right = layers.channels_first(graph, right, half, side, side)
    # Channel by channel: the published shuffle of two groups.
    pair = [graph.reshape(branch, 0, half, 1, side * side) for branch in (left, right)]
    shuffled = graph.reshape(graph("Concat", *pair, axis=2), 0, 2 * half, side, side)
    return graph("Add", x, shuffled)
