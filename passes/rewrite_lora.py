"""Add LoRA's low-rank term wherever a graph multiplies by the matrix that LoRA is added to.

    y = rana.masked_gemv(v, tau, weight, ...)
  becomes
    m = where(v^2 >= tau, v, 0); z = linear(dropout(m), a) * scaling; y = rana.masked_gemv(v, tau, weight, ...) + linear(z, b)
  and without the mask for y = rana.router(x, weight), y = linear(x, weight, bias) and other forms of a matmul;
    h = rana.masked_rows(x, a, weight)     becomes     z = ...; h = rana.masked_rows(x, a, weight) + a * linear(z, b)
    y = embedding(i, weight)     becomes     y = embedding(i, weight) + embedding(i, b) * scaling @ a

The term is behind the same mask, so that merging changes nothing but rounding, and the sum of the matrices, which would take as
much memory as they do, is not computed. A matrix that is read otherwise (a part of it, or its transpose) is replaced by that sum
where it is read, without dropout, and recomputed in the backward pass. Runs after the rewrites, which find linears by their
weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy

from rana_fx.apply import cast
from rana_fx.graph.linears import parameters_of
from rana_fx.graph.matmuls import operands_of
from rana_fx.graph.operands import Operand, operand
from rana_fx.graph.ops import MOVEMENT, op_name
from rana_fx.kernels.ops import masked_gemv, masked_rows, router
from rana_fx.kernels.reference import kept
from rana_fx.passes.base import PassResult, PreGrad
from rana_fx.passes.emit import Emitter, dtype_of
from rana_fx.runtime.lora_state import Addition


@dataclass(frozen=True)
class _Matmul:
    """``x``, masked by ``tau``, times ``weight``, which is (in, out) if ``transposed``, times ``gate`` elementwise."""

    x: fx.Node
    weight: fx.Node
    transposed: bool
    tau: fx.Node | None = None
    gate: fx.Node | None = None


def rewrite_lora(graph_module: fx.GraphModule, context: PreGrad) -> PassResult:
    """Rewrite every read of a matrix that LoRA is added to. Counts reads."""
    tables = [found.factors.lowrank for found in context.matches.attachments if found.factors.lowrank is not None]
    if not tables:
        return PassResult()
    added = {id(addition.matrix): (addition, number) for number, table in enumerate(tables) for addition in table.additions()}
    weights = parameters_of(graph_module, context.example_inputs)
    position = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    matmuls = {node: found for node in position if (found := _matmul(node)) is not None}
    changed = 0
    for source, parameter in weights.items():
        if id(parameter) not in added:
            continue
        addition, number = added[id(parameter)]
        table, prefix = tables[number], f"rana_lowrank{number}"
        # no dropout where gradients are disabled: nothing is trained there
        dropout = table.dropout if table.rate and torch.is_grad_enabled() else None
        others = []
        for user in sorted(source.users, key=position.__getitem__):
            if _is_embedding(user, source) and not addition.transposed:
                _add_to_embedding(graph_module, user, addition, prefix)
                changed += 1
                continue
            reads = _reads(source, user, matmuls, weights, addition)
            for read in reads or ():
                _add_to_matmul(graph_module, read, addition, dropout, prefix)
            changed += len(reads or ())
            if reads is None:
                others.append(user)
        if others:
            _add_to_matrix(graph_module, source, others, addition, prefix)
            changed += len(others)
    return PassResult(changed)


def _matmul(node: fx.Node) -> _Matmul | None:
    """A node as a matmul of an activation and a matrix, or None."""
    if node.target is masked_gemv:
        x, tau, weight = node.args[:3]
        return _Matmul(x, weight, True, tau)  # type: ignore[arg-type]
    if node.target is masked_rows:
        x, gate, weight = node.args[:3]
        return _Matmul(x, weight, False, gate=gate)  # type: ignore[arg-type]
    if node.target is router:
        return _Matmul(node.args[0], node.args[1], False)  # type: ignore[arg-type]
    found = operands_of(node) if node.op in ("call_function", "call_method") else None
    if found is None or not isinstance(found.x, fx.Node) or not isinstance(found.matrix, fx.Node):
        return None
    return _Matmul(found.x, found.matrix, not found.out_first)


def _reads(
    source: fx.Node,
    user: fx.Node,
    matmuls: Mapping[fx.Node, _Matmul],
    weights: Mapping[fx.Node, nn.Parameter],
    addition: Addition,
) -> list[fx.Node] | None:
    """The matmuls in which every use of a matrix through ``user`` ends; None where one of these uses is not such a matmul."""
    matmul = matmuls.get(user)
    if matmul is not None and matmul.weight is source and matmul.x is not source:
        found = operand(source, weights)
        whole = isinstance(found, Operand) and not found.part and found.value.dim() == 2
        return [user] if whole and (matmul.transposed ^ found.flipped) == addition.transposed else None  # type: ignore[union-attr]
    if op_name(user) not in MOVEMENT or len(user.all_input_nodes) != 1 or not user.users:
        return None
    reads: list[fx.Node] = []
    for further in user.users:
        found_there = _reads(user, further, matmuls, weights, addition)
        if found_there is None:
            return None
        reads += found_there
    return reads


def _add_to_matmul(graph_module: fx.GraphModule, node: fx.Node, addition: Addition, dropout: Tensor | None, prefix: str) -> None:
    """Add LoRA's term to the output of a matmul."""
    emit, wanted = Emitter(graph_module, node), dtype_of(node)
    matmul = _matmul(node)  # its current operands: x may have got an addition since
    assert matmul is not None
    rate = None if dropout is None else emit.factor(f"{prefix}_dropout", dropout)

    def added(x: Any, tau: Any, rate: Any, a: Any, b: Any, gate: Any) -> Any:
        x = cast(x, wanted)
        if tau is not None:
            x = torch.where(kept(x, tau), x, 0.0)
        if rate is not None:
            x = torch.where(torch.rand_like(x, dtype=torch.float32) >= rate, x, 0.0)
            x = x / (1.0 - rate)
        # scaled at the rank, the smallest dimension
        y = F.linear(F.linear(x, cast(a, wanted)) * addition.scaling, cast(b, wanted))
        return y if gate is None else y.view_as(gate) * gate

    emit.after(torch.add, node, emit.record(added, matmul.x, matmul.tau, rate, *_pair(emit, addition, prefix), matmul.gate))


def _pair(emit: Emitter, addition: Addition, prefix: str) -> tuple[fx.Node, fx.Node]:
    """Nodes of LoRA's matrices a and b."""
    name = f"{prefix}_" + "".join(letter if letter.isalnum() else "_" for letter in addition.name)
    return emit.factor(f"{name}_a", addition.a), emit.factor(f"{name}_b", addition.b)


def _is_embedding(user: fx.Node, source: fx.Node) -> bool:
    """Whether a node is ``F.embedding(i, source, ...)``, without ``max_norm``, which would write to the matrix."""
    given = dict(zip(("input", "weight", "padding_idx", "max_norm"), user.args, strict=False)) | dict(user.kwargs)
    return op_name(user) == "embedding" and given.get("weight") is source and given.get("max_norm") is None


def _add_to_embedding(graph_module: fx.GraphModule, node: fx.Node, addition: Addition, prefix: str) -> None:
    """Add LoRA's term to the output of an embedding."""
    emit, wanted = Emitter(graph_module, node), dtype_of(node)

    def added(index: Any, a: Any, b: Any) -> Any:
        return torch.matmul(F.embedding(index, cast(b, wanted)) * addition.scaling, cast(a, wanted))

    index = node.args[0] if node.args else node.kwargs["input"]
    emit.after(torch.add, node, emit.record(added, index, *_pair(emit, addition, prefix)))


def _add_to_matrix(graph_module: fx.GraphModule, source: fx.Node, users: list[fx.Node], addition: Addition, prefix: str) -> None:
    """Replace the matrix by its sum with LoRA's product, for ``users`` only."""
    emit = Emitter(graph_module, users[0])
    a, b = _pair(emit, addition, prefix)
    given = len(emit.record.made)

    def summed(weight: Any, a: Any, b: Any) -> Any:
        delta = torch.matmul(b, a * addition.scaling)
        return weight + (torch.t(delta) if addition.transposed else delta).to(addition.matrix.dtype)

    total = emit.record(summed, source, a, b)
    for step in emit.record.made[given:]:
        step.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
        step.meta.setdefault("ac_graph_id", 0)
    for user in users:
        user.replace_input_with(source, total)
