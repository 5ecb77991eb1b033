"""Weights that are not the Parameters of a model with a plan, but tensors in their places.

``torch.func.functional_call`` with other tensors, FullyShardedDataParallel and whatever else swaps a model's Parameters for plain
tensors while it runs: no plan is found by such a tensor, and the graph is compiled dense.

In: a graph without attached weights, and the variables of the code that is being compiled. Out: the linears by plain tensors of
the shape of a planned linear.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import fx, nn

from rana_fx.graph.dataflow import value_of
from rana_fx.graph.matmuls import operands_of
from rana_fx.graph.names import source_name
from rana_fx.graph.ops import CASTS, MOVEMENT, is_call, op_name
from rana_fx.runtime.attachment import Attachment, Factors, attached

REASON = "its weight is a tensor in the place of the model's Parameter (torch.func.functional_call, FSDP): it runs dense"


def attachments_of_models(variables: Iterable[object]) -> list[Attachment]:
    """Of the plans on modules among some variables, also while all of their Parameters are swapped out."""
    found: dict[Attachment, None] = {}
    for module in (variable for variable in variables if isinstance(variable, nn.Module)):
        owners = [part.__dict__.get("_owner") for part in module.modules() if isinstance(part, Factors)]
        found |= dict.fromkeys(owner for owner in [attached(module), *owners] if owner is not None)
    return list(found)


def in_place_of_planned(graph: fx.Graph, attachments: Sequence[Attachment]) -> Iterator[tuple[str, str]]:
    """(name, reason) of every linear by a plain tensor that has the shape of a planned one."""
    records = [record for one in attachments for record in one.plan.sites if one.adapter(record.name) is not None]
    shapes = {(record.out_features, record.in_features) for record in records}
    for node in graph.nodes:
        operands = operands_of(node) if is_call(node) else None
        source = operands.matrix if operands is not None else None
        while isinstance(source, fx.Node) and is_call(source) and op_name(source) in MOVEMENT | CASTS and source.args:
            source = source.args[0]
        if operands is None or not isinstance(source, fx.Node) or source.op not in ("placeholder", "get_attr"):
            continue
        value = value_of(operands.matrix) if isinstance(operands.matrix, fx.Node) else None
        if not isinstance(value, torch.Tensor) or value.dim() != 2 or isinstance(value, nn.Parameter):
            continue
        rows, columns = value.shape
        if ((rows, columns) if operands.out_first else (columns, rows)) in shapes:
            yield source_name(source), REASON
