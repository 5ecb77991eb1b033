"""Put a plan on a model, and take it off.

In: a model and a plan made for its weights. Out: the model with one submodule more, ``rana_fx``, that holds the
factors as Parameters (so optimizers, ``.to()`` and ``state_dict`` see them), and with a mark on each of its
Parameters by which the backend finds the plan in any graph the weight appears in. The forward code is not touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rana_fx.adapter import Adapter
from rana_fx.dense_memory import is_freed, unshared
from rana_fx.errors import PlanMismatch, WeightsFreed
from rana_fx.graph.guards import ATTRIBUTE
from rana_fx.graph.operands import base_name
from rana_fx.graph.recompiles import forget_invalid
from rana_fx.modules import device_of, unwrap, weights_of
from rana_fx.plan import Plan, SiteRecord, weight_digest
from rana_fx.runtime.column_major import by_columns_, by_rows_
from rana_fx.runtime.lora_state import LowRank

MODULE = "rana_fx"


class Factors(nn.Module):
    """Factors of all adapters.

    What ``Adapter.trained`` names are Parameters ``a<index>_router`` ...; thresholds (fp32 whatever the model's dtype), quantised
    matrices and their scales are buffers, which are not trained and follow the model's device alone.
    """

    def __init__(
        self, plan: Plan, device: torch.device, weights: Mapping[str, nn.Parameter] | None = None, *, copy: bool = True
    ) -> None:
        """``weights``: by site; factors follow their weight's device (else ``device``) and whether it is trained.

        ``copy``: False to hold the plan's own tensors, where they are on that device.
        """
        super().__init__()
        self.lowrank: LowRank | None = None
        for index, adapter in enumerate(plan.adapters):
            owners = [] if weights is None else [weights[base_name(site)] for site in adapter.sites]
            place = owners[0].device if owners else device
            trained = any(owner.requires_grad for owner in owners) or not owners
            for key, value in adapter.tensors().items():
                moved = value.data.to(place, copy=copy)
                if key in adapter.trained:
                    self.register_parameter(f"a{index}_{key}", nn.Parameter(moved, requires_grad=trained))
                else:
                    self.register_buffer(f"a{index}_{key}", moved)

    def __deepcopy__(self, memo: dict[int, Any]) -> Factors:
        """A deep copy of the whole model stays adapted: its weights, copied just before, get marks of their own."""
        make: Any = self.__reduce_ex__(4)
        fresh: Factors = make[0](*make[1])
        memo[id(self)] = fresh
        fresh.__dict__.update({key: copy.deepcopy(value, memo) for key, value in make[2].items() if key != "_owner"})
        old: Attachment | None = self.__dict__.get("_owner")
        copied = [] if old is None else [(key, memo[key]) for key in old.marked if isinstance(memo.get(key), nn.Parameter)]
        if old is not None and copied:
            names = {id(parameter): old.names[key] for key, parameter in copied if key in old.names}
            twin = Attachment(old.plan, fresh, names)
            twin.relaid = tuple(id(parameter) for key, parameter in copied if key in old.relaid)
            twin.unshared = frozenset(id(parameter) for key, parameter in copied if key in old.unshared)
            _mark(twin, [parameter for _, parameter in copied])
        return fresh

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_owner"}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Factors:
        fixed = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in fixed.items():
            # half precision would move thresholds and what quantised numbers mean: only follow the device
            self._buffers[name] = buffer.to(getattr(self, name).device)
        return self


class Attachment:
    """What the backend finds on a weight: the plan, the factors and the names of the weights."""

    def __init__(self, plan: Plan, factors: Factors, names: dict[int, str]) -> None:
        self.plan = plan
        self.factors = factors
        self.names = names  # id of a Parameter -> site name
        self.marked: tuple[int, ...] = ()  # ids of the Parameters that carry it
        self.relaid: tuple[int, ...] = ()  # ids of those that are stored by columns because of it
        self.unshared: frozenset[int] = frozenset()  # ids of weights that may be freed: nothing else of the model is tied to them
        self._by_site = {site: (index, adapter) for index, adapter in enumerate(plan.adapters) for site in adapter.sites}

    def __reduce__(self) -> tuple[Any, ...]:
        # ids mean nothing in another process: a pickled model is to be attached to again
        return (_nothing, ())

    def adapter(self, site: str) -> tuple[int, Adapter] | None:
        """(index in the plan, adapter) of a site."""
        return self._by_site.get(site)

    def tensor(self, index: int, key: str) -> Tensor | None:
        """The live factor ``key`` of adapter ``index``."""
        return getattr(self.factors, f"a{index}_{key}", None)


class _Mark:
    """What sits on marked Parameters. Compiled code is guarded on it, and nothing else holds it.

    Once it is taken off the last of them, that code is invalid by itself.
    """

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def __reduce__(self) -> tuple[Any, ...]:
        return (_nothing, ())


def _nothing() -> None:
    return None


def _mark(attachment: Attachment, parameters: list[nn.Parameter]) -> None:
    attachment.marked = tuple(map(id, parameters))
    attachment.factors.__dict__["_owner"] = attachment
    mark = _Mark(attachment)
    for parameter in parameters:
        setattr(parameter, ATTRIBUTE, mark)
    forget_invalid()


def invalidate_guards(model: nn.Module) -> None:
    """Mark the model's weights anew, with the same plan and factors, so that code compiled before compiles again."""
    old = attached(unwrap(model))
    assert old is not None
    twin = Attachment(old.plan, old.factors, old.names)
    twin.relaid, twin.unshared = old.relaid, old.unshared
    _mark(twin, [parameter for parameter in unwrap(model).parameters() if attachment_of(parameter) is old])


def attach(model: nn.Module, plan: Plan) -> None:
    """Attach ``plan`` to ``model``; replaces a plan that is attached. Functions compiled before recompile by themselves.

    Weights of the model that the plan skips columns of (neuron adapters without a weight of their own; exact outputs, where the
    weight is stored (in, out)) are stored by columns from then on: values, shapes and memory stay, strides change, and ``detach``
    changes them back. (Libraries that save tensors as they are laid out, such as safetensors, take ``.contiguous()`` ones alone;
    ``save_pretrained`` makes them so.)

    A ``copy.deepcopy`` of the model is adapted, too; a pickled and loaded one (or one whose Parameters were replaced) is
    not: attach the plan again. ``state_dict`` includes the factors, as ``rana_fx.*``: ``detach`` first for one without.

    Raises:
        PlanMismatch: other architecture, shapes, dtype or weights than the plan was made for.
        WeightsFreed: the model was compiled with ``prefill="factors"``.
    """
    model = unwrap(model)
    parameters = weights_of(model)
    for record in plan.sites:
        _check(model, record, parameters.get(base_name(record.name)))
    attach_unchecked(model, plan)


def attach_unchecked(model: nn.Module, plan: Plan, *, copy: bool = True) -> None:
    """``attach`` without the check that the plan is for these weights.

    ``copy``: False where the plan's tensors become the model's factors and may change with them.
    """
    model = unwrap(model)
    parameters = weights_of(model)
    detach(model)
    names: dict[int, str] = {}
    for record in plan.sites:
        weight = base_name(record.name)
        names[id(parameters[weight])] = weight
    own = {site for adapter in plan.adapters if adapter.weight is None for site in adapter.sites}
    # an output computed exactly reads its row of W, which is a column of a weight that is stored (in, out)
    transposed = {record.name for record in plan.sites if record.transposed}
    own |= {site for adapter in plan.adapters if adapter.exact_tau is not None for site in adapter.sites} & transposed
    with torch.inference_mode(False):  # what is made inside it could never be trained
        attachment = Attachment(plan, Factors(plan, device_of(model), parameters, copy=copy), names)
        relaid = by_columns_((parameters[site] for site in own if site in parameters), among=model.parameters())
    attachment.relaid = tuple(map(id, relaid))
    attachment.unshared = unshared(model)
    _mark(attachment, list(model.parameters()))
    model.add_module(MODULE, attachment.factors)


def detach(model: nn.Module) -> Plan | None:
    """Take the plan off and return it (None when there was none). The model is then as it was before ``attach``.

    Raises:
        WeightsFreed: the model was compiled with ``prefill="factors"``, and runs only by this plan.
    """
    model = unwrap(model)
    found = attached(model)
    freed = next((name for name, weight in weights_of(model).items() if is_freed(weight)), None)
    if freed is not None:
        raise WeightsFreed(site=freed, what="detach the plan")
    if found is not None:
        with torch.inference_mode(False):
            by_rows_(parameter for parameter in model.parameters() if id(parameter) in found.relaid)
    for parameter in model.parameters():
        if hasattr(parameter, ATTRIBUTE):
            delattr(parameter, ATTRIBUTE)
    if isinstance(getattr(model, MODULE, None), Factors):
        delattr(model, MODULE)
    forget_invalid()
    return None if found is None else found.plan


def attached(model: nn.Module) -> Attachment | None:
    """The attachment of a model, if it has one."""
    return next((found for found in map(attachment_of, model.parameters()) if found is not None), None)


def attachment_of(parameter: Any) -> Attachment | None:
    """The attachment of the model a Parameter belongs to, if any."""
    found = getattr(parameter, ATTRIBUTE, None)
    return found.attachment if isinstance(found, _Mark) else None


def _check(model: nn.Module, record: SiteRecord, weight: nn.Parameter | None) -> None:
    name = type(model).__name__
    if weight is None:
        raise PlanMismatch(model=name, site=record.name, got="no such weight", expected=f"a weight of a {record.op}")
    shape = (record.in_features, record.out_features) if record.transposed else (record.out_features, record.in_features)
    part = weight.dim() != 2 or base_name(record.name) != record.name
    if tuple(weight.shape) != shape and not part:  # parts of a weight are known by the digest of all of it
        raise PlanMismatch(model=name, site=record.name, got=f"shape {tuple(weight.shape)}", expected=f"shape {shape}")
    dtype = str(weight.dtype).removeprefix("torch.")
    if dtype != record.dtype:
        raise PlanMismatch(model=name, site=record.name, got=f"dtype {dtype}", expected=f"dtype {record.dtype}")
    if is_freed(weight):
        raise WeightsFreed(site=record.name, what="attach a plan")
    if weight_digest(weight) != record.digest:
        raise PlanMismatch(model=name, site=record.name, got="other weights", expected=f"weights with digest {record.digest}")
