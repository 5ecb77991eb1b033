"""Aliasing of graph outputs: which share memory with inputs and with each other. A pass must not add such pairs.

In: the fake values of a graph's nodes; views of a fake tensor share its storage as real ones do. Out: pairs that share memory.
The fake value of a node that reads another tensor than when it was traced still uses the storage of the old tensor; ``join``
records that both storages represent the same memory.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

from rana_fx.graph.dataflow import value_of
from rana_fx.graph.transforms import unwrapped


def storages(value: Any) -> set[StorageWeakRef]:
    """The storages of the tensors of a value. Sparse layouts and tensor subclasses, which have several, are omitted."""
    return {StorageWeakRef(leaf.untyped_storage()) for leaf in _strided(value)}


def _strided(value: Any) -> list[Tensor]:
    leaves: list[Any] = [unwrapped(leaf) if isinstance(leaf, Tensor) else leaf for leaf in optree.tree_leaves(value)]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.layout is torch.strided and torch._C._has_storage(leaf)]


class Aliases:
    """Union-find over the storages of one graph, some of which represent the same memory."""

    def __init__(self) -> None:
        # storage -> (parent, offset of the storage in the memory of its parent in bytes; None: not known); a weak reference
        # prevents reuse of the address, so that it identifies one storage
        self._parent: dict[StorageWeakRef, tuple[StorageWeakRef, int | None]] = {}

    def root(self, storage: StorageWeakRef) -> tuple[StorageWeakRef, int | None]:
        """(the representative of a storage, the offset of the storage in it in bytes, or None where it is not known)."""
        shift: int | None = 0
        while storage in self._parent:
            storage, further = self._parent[storage]
            shift = None if shift is None or further is None else shift + further
        return storage, shift

    def join(self, one: object, other: object) -> None:
        """Record that two values are the same memory, element by element."""
        for first in _strided(one):
            for second in _strided(other):
                (a, before), (b, after) = (self.root(StorageWeakRef(tensor.untyped_storage())) for tensor in (first, second))
                if a != b:
                    place, target = _extent(first), _extent(second)
                    known = before is not None and after is not None and place and target and _steps(first) == _steps(second)
                    self._parent[a] = (b, target[0] + after - place[0] - before if known else None)  # type: ignore[operator]

    def pairs(self, graph: fx.Graph) -> frozenset[tuple[str, str]]:
        """(output, input) and (output, output) that share memory; outputs by position.

        Pieces of one storage with disjoint byte ranges do not share memory, such as columns of a stacked product of one token.
        """
        leaves: list[object] = []
        fx.node.map_aggregate(graph.output_node().args, lambda leaf: leaves.append(leaf))
        by_root: dict[StorageWeakRef, list[tuple[str, _Piece]]] = {}  # of all inputs, and of the outputs so far
        for node in graph.nodes:
            for piece in self._pieces(value_of(node)) if node.op in ("placeholder", "get_attr") else ():
                by_root.setdefault(piece.root, []).append((node.name, piece))
        found = set()
        for output, leaf in ((f"output {index}", leaf) for index, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)):
            pieces = self._pieces(value_of(leaf))
            found |= {
                (output, other) for piece in pieces for other, known in by_root.get(piece.root, ()) if _overlap(piece, known)
            }
            for piece in pieces:
                by_root.setdefault(piece.root, []).append((output, piece))
        return frozenset(found)

    def _pieces(self, value: object) -> list[_Piece]:
        found = []
        for leaf in _strided(value):
            root, shift = self.root(StorageWeakRef(leaf.untyped_storage()))
            extent = () if shift is None else _extent(leaf)
            found.append(_Piece(root, *(place + (shift or 0) for place in extent)))
        return found


@dataclass(frozen=True)
class _Piece:
    """The bytes ``start`` to ``stop`` of the memory ``root``; all bytes where the range is not known."""

    root: StorageWeakRef
    start: int = -sys.maxsize
    stop: int = sys.maxsize


def _extent(tensor: Tensor) -> tuple[int, ...]:
    """(start, stop) of a tensor in its storage, in bytes; empty where the range depends on symbolic sizes."""
    sizes, strides, offset = tensor.shape, tensor.stride(), tensor.storage_offset()
    if not all(isinstance(number, int) for number in (*sizes, *strides, offset)):
        return ()
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) if tensor.numel() else -1
    return int(offset) * tensor.element_size(), int(offset + last + 1) * tensor.element_size()


def _steps(tensor: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides of the dimensions that have more than one element."""
    return [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]


def _overlap(one: _Piece, other: _Piece) -> bool:
    """Whether two pieces of the same memory have a byte in common."""
    return one.start < other.stop and other.start < one.stop
