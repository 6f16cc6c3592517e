"""The selective scan as a function of standard ONNX operators.

Blocks of positions go through an outer Scan. For a whole block at once its body computes what
needs no state, the decays exp(delta A) and the drives B (delta x); an inner Scan then takes the
positions one by one and does nothing but ``s <- decay * s + drive`` and ``y = C s``. Every decay
comes from its own step, and nothing is divided by a decay: nothing can overflow.

benchmarks/NOTES.md says which other forms were measured.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from mambamic.export.onnx_graph import Graph, integers

DOMAIN = "mambamic"
NAME = "SelectiveScan"
OPSET = 20
# Decays of a block: 0.4 MB, so that the few arrays in use stay in a core's second cache.
BLOCK_ELEMENTS = 98304


def block_length(length: int, lanes: int) -> int:
    """Return how many positions a block has: a divisor of the length, near the best.

    Args:
        length: Of the sequences.
        lanes: States per position, of all sequences of an image together.
    """
    wanted = max(1.0, BLOCK_ELEMENTS / lanes)
    divisors = [n for n in range(1, length + 1) if length % n == 0]
    return min(divisors, key=lambda n: max(n / wanted, wanted / n))


def selective_scan() -> onnx.FunctionProto:
    """Return the function, for any sizes.

    K directions, B sequences in each, D channels, N states; Q positions in each of T blocks.
    Narrow groups of channels may lie side by side, G of them, each with its own B and C.

    Inputs:
        x: (T, Q, K, B, 1, D).
        step: (T, Q, K, B, 1, D), before the softplus that makes it positive.
        B: (T, Q, K, B, N, G).
        C: (T, Q, K, B, G, N).
        A: (K, 1, N, D), negative.
        groups: (G, D), 1 where a channel belongs to a group, else 0.

    Output:
        y: (T, Q, K, B, 1, D), without the skip connection.
    """
    graph = Graph(inline=True)
    zero = graph.constant(np.array(0))
    first = graph("Gather", graph("Gather", "x", zero), zero)
    start = graph("ConstantOfShape", graph("Shape", graph("Mul", first, "A")))
    inputs = (start, "x", "step", "B", "C")
    _, y = graph.several("Scan", 2, *inputs, body=_block(), num_scan_inputs=4)
    graph.name(y, "y")
    return helper.make_function(
        DOMAIN,
        NAME,
        ["x", "step", "B", "C", "A", "groups"],
        ["y"],
        graph.nodes,
        [helper.make_opsetid("", OPSET)],
    )


def _block() -> onnx.GraphProto:
    """Build the outer body, a block of positions; A and groups come from around it."""
    graph = Graph("block_")
    delta = _softplus(graph, "block_step")
    decay = graph("Exp", graph("Mul", delta, "A"))
    # A group's channels in a row of their own: so a matrix product gives each its own B.
    rows = graph("Mul", graph("Mul", delta, "block_x"), "groups")
    drive = graph("MatMul", "block_B", rows)
    inputs = ("block_state", decay, drive, "block_C")
    state, y = graph.several("Scan", 2, *inputs, body=_position(), num_scan_inputs=3)
    own = graph("ReduceSum", graph("Mul", y, "groups"), integers(-2))
    names = ["block_state", "block_x", "block_step", "block_B", "block_C"]
    return graph.as_subgraph("block", names, [state, own])


def _position() -> onnx.GraphProto:
    """Build the inner body, one position."""
    graph = Graph("position_")
    kept = graph("Mul", "position_decay", "position_before")
    state = graph("Add", kept, "position_drive")
    y = graph("MatMul", "position_C", state)
    names = ["position_before", "position_decay", "position_drive", "position_C"]
    return graph.as_subgraph("position", names, [state, y])


def _softplus(graph: Graph, x: str) -> str:
    """Append log(1 + exp(x)): a third of the time that ONNX Runtime takes for Softplus.

    It is max(x, 0) + log(1 + w) with w = exp(-|x|); what the rounding of 1 + w took from w is
    added again, for small steps are as exact as large ones.
    """
    w = graph("Exp", graph("Neg", graph("Abs", x)))
    one = np.array(1, np.float32)
    above = graph("Add", w, one)
    lost = graph("Sub", w, graph("Sub", above, one))
    return graph("Add", graph("Relu", x), graph("Add", graph("Log", above), lost))
