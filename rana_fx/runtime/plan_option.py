"""A plan given to the backend as an option, ``options={"plan": plan}``, instead of attached to the model.

In: a plan or its folder, and the weights of one graph. Out: an ``Attachment`` with the names of those weights that the
plan was made for. Names alone do not identify a weight: they are relative to the compiled module (``gate_proj`` when an MLP is
compiled by itself), so a weight is matched with the site whose name has the same end and whose digest is that of its bytes. The
model is not changed; to train factors, attach the plan instead.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from rana_fx.errors import InvalidOption, PlanMismatch
from rana_fx.graph.linears import source_name
from rana_fx.graph.operands import base_name
from rana_fx.plan import Plan, load_plan, weight_digest
from rana_fx.runtime.attachment import Attachment, Factors

# one set of factors serves every graph (prefill, decode) that is compiled by a plan
_attachments: WeakKeyDictionary[Plan, dict[torch.device, Attachment]] = WeakKeyDictionary()
_sites: WeakKeyDictionary[Plan, WeakTensorKeyDictionary] = WeakKeyDictionary()  # hashing takes about a second per gigabyte


def plan_of(value: object) -> Plan:
    """The plan that an option is, or is the folder of. Raises InvalidOption, PlanFileError, PlanVersion."""
    if isinstance(value, Plan):
        return value
    if isinstance(value, (str, Path)):
        from rana_fx.plan_io import HEADER

        header = Path(value) / HEADER
        return _load(Path(value), header.stat().st_mtime_ns if header.is_file() else 0)
    raise InvalidOption(name="plan", got=value, expected="a rana_fx.Plan, or the folder of a saved one")


@functools.lru_cache(maxsize=8)
def _load(folder: Path, changed_ns: int) -> Plan:
    return load_plan(folder)


def attachment_for(plan: Plan, weights: Mapping[fx.Node, nn.Parameter]) -> Attachment | None:
    """The attachment of ``plan`` for the weights of one graph; None where none of them is in the plan.

    Raises:
        PlanMismatch: a weight has the name of a site and other bytes.
    """
    device = next((weight.device for weight in weights.values()), torch.device("cpu"))
    on_device = _attachments.setdefault(plan, {})
    if device not in on_device:
        on_device[device] = Attachment(plan, Factors(plan, device), {})
    found, sites = on_device[device], _sites.setdefault(plan, WeakTensorKeyDictionary())
    matched = False
    for node, weight in weights.items():
        if weight not in sites:
            sites[weight] = _site(plan, source_name(node), weight)
        found.names.pop(id(weight), None)  # the id may have belonged to a weight that was deleted
        if sites[weight] is not None:
            found.names[id(weight)] = sites[weight]
            matched = True
    return found if matched else None


def _site(plan: Plan, name: str, weight: nn.Parameter) -> str | None:
    """The plan's name of a weight (several sites may be parts of it), or None."""
    names = {base_name(record.name): record for record in plan.sites}
    if not any(record.out_features * record.in_features <= weight.numel() for record in plan.sites) or weight.dim() < 2:
        return None
    alike = {
        other: record for other, record in names.items() if f".{other}".endswith(f".{name}") or f".{name}".endswith(f".{other}")
    }
    digest = weight_digest(weight)
    for other, record in (alike | names).items():
        if record.digest == digest:
            return other
    if not alike:
        return None
    expected = f"a weight with digest {' or '.join(record.digest for record in list(alike.values())[:3])}"
    raise PlanMismatch(model="the model being compiled", site=name, got=f"digest {digest}", expected=expected)
