"""Boxes of Inductor's IR: what a lowering returns is a box of a box of a buffer, or of a view of one."""

from __future__ import annotations

from typing import Any

from torch._inductor import ir


def boxed(node: Any) -> ir.TensorBox:
    """A realized node as a lowering takes it."""
    if isinstance(node, ir.TensorBox):
        return node
    return ir.TensorBox(node if isinstance(node, (ir.BaseView, ir.StorageBox)) else ir.StorageBox(node))


def unboxed(node: Any) -> Any:
    """The buffer or view itself."""
    while isinstance(node, (ir.TensorBox, ir.StorageBox)):
        node = node.data
    return node
