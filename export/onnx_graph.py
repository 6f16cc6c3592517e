"""A small builder of ONNX graphs: one call per operator, constants where arrays are passed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
Operand = str | Array


def integers(*values: int) -> NDArray[np.int64]:
    """Return a vector of shapes, axes or indices."""
    return np.array(values, np.int64)


class Graph:
    """The nodes and constants of a graph, a subgraph, or a function under construction.

    Args:
        prefix: Of all names in it; those of a subgraph must differ from those around it.
        inline: Whether constants are nodes: a function has no other ones.
    """

    def __init__(self, prefix: str = "", *, inline: bool = False) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._prefix, self._inline = prefix, inline
        self._scope = ""
        self._names = 0
        self._known: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def __call__(self, operator: str, *inputs: Operand, **attributes: Any) -> str:
        """Append a node with one output and return the output's name."""
        return self.several(operator, 1, *inputs, **attributes)[0]

    def several(self, operator: str, count: int, *inputs: Operand, **attributes: Any) -> list[str]:
        """Append a node and return the names of its ``count`` outputs."""
        names = [name if isinstance(name, str) else self.constant(name) for name in inputs]
        self._names += 1
        label = f"{self._prefix}{self._scope}{operator}_{self._names}"
        outputs = [label if count == 1 else f"{label}_{i}" for i in range(count)]
        self.nodes.append(helper.make_node(operator, names, outputs, name=label, **attributes))
        return outputs

    def scope(self, name: str) -> None:
        """Let the names of what follows say to which part of the network it belongs."""
        self._scope = f"{name}/"

    def constant(self, array: Array) -> str:
        """Store an array, once however often it is used, and return its name."""
        array = np.require(array, requirements="C")
        key = (array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._known:
            name = self._known[key] = f"{self._prefix}constant_{len(self._known)}"
            tensor = numpy_helper.from_array(array, name)
            if self._inline:
                self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
            else:
                self.constants.append(tensor)
        return self._known[key]

    def reshape(self, x: str, *shape: int) -> str:
        """Append a Reshape: 0 keeps a size, -1 stands for what is left."""
        return self("Reshape", x, integers(*shape))

    def transpose(self, x: str, *order: int) -> str:
        """Append a Transpose."""
        return self("Transpose", x, perm=list(order))

    def name(self, inner: str, outer: str) -> None:
        """Give a value the name under which it leaves the graph."""
        self.nodes.append(helper.make_node("Identity", [inner], [outer], name=f"{outer}_name"))

    def as_subgraph(
        self, name: str, inputs: Sequence[str], outputs: Sequence[str]
    ) -> onnx.GraphProto:
        """Return a subgraph of float values whose shapes the surroundings know."""
        return helper.make_graph(
            self.nodes,
            name,
            [_untyped(value) for value in inputs],
            [_untyped(value) for value in outputs],
            self.constants,
        )


def _untyped(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
