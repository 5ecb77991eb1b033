"""Make a plan from a trained model.

In: a model that was trained with a plan attached. Out: a Plan with the current factors and thresholds, for the current weights: a
new digest, the same file format. Expected kept ranks and costs are those of the attached plan; errors and the curve, which were
measured before training, are dropped.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rana_fx.adapter import Adapter
from rana_fx.dense_memory import is_freed
from rana_fx.graph.operands import base_name
from rana_fx.modules import unwrap
from rana_fx.plan import Plan, SiteRecord, weight_digest
from rana_fx.runtime.attachment import Attachment
from rana_fx.training.lora import merge_lora
from rana_fx.training.parameters import attachment_to_train, weights_to_train


def trained_plan(model: nn.Module) -> Plan:
    """The plan of a model's current factors. LoRA (``add_lora``) is merged into factors and weights first, and removed.

    The plan holds copies: further training does not change it. Where weights of the model were trained, too, the plan fits only
    the trained weights: save both, with ``detach(model)`` before ``save_pretrained``. (``detach`` returns the plan as it was
    attached.) After a cast of the model (``model.bfloat16()``) it is a plan for that dtype.

    Raises:
        NoPlan: no plan is attached.
        InvalidOption: ``model`` is a wrapper around the model that the plan was attached to.
    """
    model = unwrap(model)
    found = attachment_to_train(model)
    weights = weights_to_train(model, found)
    merge_lora(model)
    records = tuple(_record(record, weights[base_name(record.name)]) for record in found.plan.sites)
    widths = {record.name: _itemsize(record) / _itemsize(old) for record, old in zip(records, found.plan.sites, strict=True)}
    adapters = tuple(_adapter(found, index, widths) for index in range(len(found.plan.adapters)))
    return replace(found.plan, sites=records, adapters=adapters, curve=None)


def _itemsize(record: SiteRecord) -> int:
    return int(getattr(torch, record.dtype).itemsize)


def _record(record: SiteRecord, weight: nn.Parameter) -> SiteRecord:
    if is_freed(weight):
        return record  # a freed weight cannot have been trained
    return replace(record, dtype=str(weight.dtype).removeprefix("torch."), digest=weight_digest(weight))


def _adapter(found: Attachment, index: int, widths: dict[str, float]) -> Adapter:
    old = found.plan.adapters[index]
    live: dict[str, Any] = {}
    for key, before in old.tensors().items():
        now = found.tensor(index, key)
        assert now is not None, key
        live[key] = now.detach().clone(memory_format=torch.contiguous_format)
        if key != "tau" and (now.dtype != before.dtype or not torch.equal(live[key].cpu(), before.cpu())):
            live["error"] = None
    adapter = replace(old, **live)
    width = widths[old.sites[0]]
    if width == 1:
        return adapter
    adapter = replace(adapter, bytes=adapter.bytes * width, dense_bytes=adapter.dense_bytes * width)
    return adapter if adapter.weight is None else replace(adapter, bytes=adapter.cost("bytes", adapter.kept))
