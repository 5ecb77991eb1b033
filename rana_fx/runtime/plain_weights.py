"""Weights that are not the Parameters of a model with a plan, but tensors in their places.

``torch.func.functional_call`` with other tensors, FullyShardedDataParallel and whatever else swaps a model's Parameters for plain
tensors while it runs: no plan is found by such a tensor, and the graph is compiled dense.

In: a graph, the plans of the models that it may be of, and the names of the planned weights that it has or that are reported
already. Out: the linears by plain tensors of the shape of a planned linear that is not among these. Buffers are no such tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import fx, nn

from rana_fx.graph.dataflow import value_of
from rana_fx.graph.matmuls import operands_of
from rana_fx.graph.names import source_name, source_text
from rana_fx.graph.operands import base_name
from rana_fx.graph.ops import CASTS, MOVEMENT, is_call, op_name
from rana_fx.plan import Plan
from rana_fx.runtime.attachment import Attachment, Factors, attached
from rana_fx.runtime.changed_weights import PLAIN


def attachments_of_models(variables: Iterable[object]) -> list[Attachment]:
    """Of the plans on modules among some variables, also while all of their Parameters are swapped out."""
    found: dict[Attachment, None] = {}
    for module in (variable for variable in variables if isinstance(variable, nn.Module)):
        owners = [part.__dict__.get("_owner") for part in module.modules() if isinstance(part, Factors)]
        found |= dict.fromkeys(owner for owner in [attached(module), *owners] if owner is not None)
    return list(found)


def in_place_of_planned(graph: fx.Graph, plans: Iterable[Plan], present: Collection[str | None]) -> Iterator[tuple[str, str]]:
    """(name, reason) of every linear by a plain tensor that has the shape of a planned one whose weight is not ``present``."""
    shapes: set[tuple[int, int]] = set()
    for plan in plans:
        planned = {site for adapter in plan.adapters for site in adapter.sites}
        absent = [record for record in plan.sites if record.name in planned and base_name(record.name) not in present]
        shapes |= {(record.out_features, record.in_features) for record in absent}
    for node in graph.nodes if shapes else ():
        operands = operands_of(node) if is_call(node) else None
        source = operands.matrix if operands is not None else None
        while isinstance(source, fx.Node) and is_call(source) and op_name(source) in MOVEMENT | CASTS and source.args:
            source = source.args[0]
        if operands is None or not isinstance(source, fx.Node) or source.op not in ("placeholder", "get_attr"):
            continue
        # a view of a Parameter is none itself
        if isinstance(value_of(source), nn.Parameter) or "_buffers[" in source_text(source) or source_name(source) in present:
            continue
        value = value_of(operands.matrix) if isinstance(operands.matrix, fx.Node) else None
        if not isinstance(value, torch.Tensor) or value.dim() != 2:
            continue
        rows, columns = value.shape
        if ((rows, columns) if operands.out_first else (columns, rows)) in shapes:
            yield source_name(source), PLAIN
