"""What a recorded graph computes twice or for nothing is taken out of it; its results stay the same, bit by bit.

An objective that runs a guide twice at the same draws, once with weights that take no gradient, is recorded with two
equal encoders. In a graph, equal calls with equal tensors become one call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

_SAME_TENSOR = (torch.ops.aten.alias.default, torch.ops.aten.detach.default)  # without gradients, nothing to do
_FRESH = torch.ops.aten.lift_fresh_copy.default  # the copy of a number or array that the program wrote down
_SHARING = (torch.ops.aten._unsafe_view.default,)  # views that are not declared as such
_SMALL = 64  # constants of more entries are not compared


def simplify(graph: GraphModule) -> GraphModule:
    """Merge equal calls of a recorded graph, and leave out what has no effect; the graph is changed in place.

    Random numbers are drawn as before, also those that are not used, since later draws depend on their number. What
    shares memory with a tensor that the graph writes to is neither merged nor left out, and calls that read such memory
    are equal only if nothing was written in between.

    Args:
        graph: a graph of `make_fx`, which is run without gradients.
    """
    memory = _Memory(graph)
    first: dict[Hashable, Node] = {}
    for node in list(graph.graph.nodes):
        if memory.is_written(node):
            memory.write(node)
        elif node.target in _SAME_TENSOR:
            _replace(node, node.args[0])
        elif (key := _key(graph, node)) is not None:
            earlier = first.setdefault((key, memory.versions(node)), node)
            if earlier is not node:
                _replace(node, earlier)
    graph.graph.eliminate_dead_code(is_impure_node=_has_effect)
    graph.recompile()
    return graph


def _replace(node: Node, earlier: Any) -> None:
    node.replace_all_uses_with(earlier)
    node.graph.erase_node(node)


class _Memory:
    """Which nodes of a graph may share memory, and how often the graph has written to it so far.

    Inputs and constants may share memory with each other: a graph that writes to one of them may change them all.
    """

    def __init__(self, graph: GraphModule) -> None:
        self._parents: dict[Node, Node] = {}
        self._writes: Counter[Node] = Counter()
        nodes = list(graph.graph.nodes)
        for node in nodes:
            for source in _shared_with(node):
                self._join(node, source)
        given = [node for node in nodes if node.op in ("placeholder", "get_attr")]
        written = {self._root(target) for node in nodes for target in _targets(node)}
        if any(self._root(node) in written for node in given):
            for node in given:
                self._join(node, given[0])
        self._written = {self._root(node) for node in written}

    def is_written(self, node: Node) -> bool:
        """Whether the graph writes to memory that the node may share, at any time."""
        return self._root(node) in self._written or any(True for _ in _targets(node))

    def write(self, node: Node) -> None:
        for target in _targets(node):
            self._writes[self._root(target)] += 1

    def versions(self, node: Node) -> Hashable:
        """How often the memory of each input of a node was written to."""
        return tuple(self._writes[self._root(source)] for source in node.all_input_nodes)

    def _root(self, node: Node) -> Node:
        while node in self._parents:
            node = self._parents[node]
        return node

    def _join(self, node: Node, source: Node) -> None:
        mine, theirs = self._root(node), self._root(source)
        if mine is not theirs:
            self._parents[mine] = theirs


def _shared_with(node: Node) -> Iterator[Node]:
    """The inputs with which the result of a node may share memory: all inputs of an operator that can return a view."""
    op = node.target
    if node.op != "call_function":
        return
    is_new = isinstance(op, OpOverload) and all(part.alias_info is None for part in op._schema.returns)
    if not is_new or op in _SHARING:
        yield from node.all_input_nodes


def _targets(node: Node) -> Iterator[Node]:
    """The inputs that a node writes to; all inputs of a function that does not declare it."""
    op = node.target
    if node.op != "call_function" or op is getitem:
        return
    if not isinstance(op, OpOverload):
        yield from node.all_input_nodes
        return
    places = op._schema.arguments
    given = dict(zip([place.name for place in places], node.args, strict=False)) | node.kwargs
    for place in places:
        if place.is_write and place.name in given:
            found: list[Node] = []
            map_arg(given[place.name], found.append)
            yield from found


def _key(graph: GraphModule, node: Node) -> Hashable | None:
    """What nodes with the same result have in common; None for a node that is not merged."""
    if node.op == "get_attr":
        return node.target
    if node.op != "call_function" or not _is_pure(node):
        return None
    source = node.args[0] if node.args else None
    if node.target is _FRESH and isinstance(source, Node) and source.op == "get_attr":
        return _constant(getattr(graph, str(source.target), None)) or node
    return node.target, _frozen(node.args), _frozen(node.kwargs)


def _constant(value: Any) -> Hashable | None:
    """The content of a small constant. (Buffers are not compared by content, since it may change after recording.)"""
    if not isinstance(value, Tensor) or value.numel() > _SMALL or value.layout is not torch.strided:
        return None
    return value.dtype, value.device, value.shape, repr(value.tolist())


def _frozen(argument: Any) -> Hashable:
    """An argument as a key of a dict, in which 1, 1.0 and True differ, and 0.0 and -0.0."""
    if isinstance(argument, list | tuple):
        return type(argument).__name__, *(_frozen(part) for part in argument)
    if isinstance(argument, dict):
        return tuple((name, _frozen(value)) for name, value in sorted(argument.items()))
    if isinstance(argument, Node):
        return argument
    return type(argument), repr(argument) if isinstance(argument, float) else argument


def _is_pure(node: Node) -> bool:
    """Whether a call gives the same result whenever it is made with the same arguments, and does nothing else."""
    op = node.target
    if isinstance(op, OpOverload):
        return op.namespace in ("aten", "prims") and not (op._schema.is_mutable or _is_random(op))
    return op is getitem


def _is_random(op: OpOverload) -> bool:
    takes_generator = any("Generator" in str(place.type) for place in op._schema.arguments)
    return takes_generator or torch.Tag.nondeterministic_seeded in op.tags


def _has_effect(node: Node) -> bool:
    """Whether a node stays although its result is not used."""
    return node.op in ("placeholder", "output") or (node.op == "call_function" and not _is_pure(node))
