"""Attach a plan to a model, and detach it.

In: a model and a plan made for its weights. Out: the model with one submodule more, ``rana_fx``, that holds the
factors as Parameters (so optimizers, ``.to()`` and ``state_dict`` include them), and with an attribute on each of its
Parameters by which the backend finds the plan in any graph that reads the weight. The forward code is not changed.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from rana_fx.adapter import Adapter
from rana_fx.dense_memory import is_freed, unshared
from rana_fx.errors import WeightsFreed
from rana_fx.graph.guards import ATTRIBUTE
from rana_fx.graph.operands import base_name
from rana_fx.graph.real_values import local, root_of, source_of
from rana_fx.graph.recompiles import forget_invalid
from rana_fx.modules import device_of, unwrap, weights_of
from rana_fx.notices import report
from rana_fx.ordinary import is_ordinary
from rana_fx.plan import Plan, SiteRecord, as_plan, weight_digest
from rana_fx.runtime.changed_weights import TODO, Watch, adopt, stale_when_loaded
from rana_fx.runtime.column_major import by_columns_, by_rows_, why_by_rows
from rana_fx.runtime.lora_state import LowRank
from rana_fx.runtime.pass_through import LastPart
from rana_fx.runtime.plan_fit import check_fit, records_of

MODULE = "rana_fx"


class Factors(LastPart):
    """Factors of all adapters.

    What ``Adapter.trained`` names are Parameters ``a<index>_router`` ...; thresholds (fp32 whatever the model's dtype), quantised
    matrices and their scales are buffers, which are not trained and follow the model's device but not its dtype.
    """

    def __init__(
        self, plan: Plan, device: torch.device, weights: Mapping[str, nn.Parameter] | None = None, *, copy: bool = True
    ) -> None:
        """``weights``: by site; factors get the device and ``requires_grad`` of their weight. Without: ``device``, and True.

        ``copy``: False to use the plan's own tensors, where they are on that device.
        """
        super().__init__()
        self.lowrank: LowRank | None = None
        for index, adapter in enumerate(plan.adapters):
            owners = [] if weights is None else [weights[base_name(site)] for site in adapter.sites]
            own_device = owners[0].device if owners else device
            trained = any(owner.requires_grad for owner in owners) or not owners
            for key, value in adapter.tensors().items():
                moved = value.data.to(own_device, copy=copy)
                if key in adapter.trained:
                    self.register_parameter(f"a{index}_{key}", nn.Parameter(moved, requires_grad=trained))
                else:
                    self.register_buffer(f"a{index}_{key}", moved)

    def __deepcopy__(self, memo: dict[int, Any]) -> Factors:
        """A deep copy of the whole model stays adapted: its weights, copied before this module, get their own attachment."""
        make: Any = self.__reduce_ex__(4)
        fresh: Factors = make[0](*make[1])
        memo[id(self)] = fresh
        fresh.__dict__.update({key: copy.deepcopy(value, memo) for key, value in make[2].items() if key != "_owner"})
        old: Attachment | None = self.__dict__.get("_owner")
        copied = [] if old is None else [(key, memo[key]) for key in old.marked if isinstance(memo.get(key), nn.Parameter)]
        model = None if old is None or old.watch is None else memo.get(id(old.watch.model()))
        if old is not None and copied:
            names = {id(parameter): old.names[key] for key, parameter in copied if key in old.names}
            new = Attachment(old.plan, fresh, names)
            new.relaid = tuple(id(parameter) for key, parameter in copied if key in old.relaid)
            new.unshared = frozenset(id(parameter) for key, parameter in copied if key in old.unshared)
            new.by_rows, new.checked = old.by_rows, old.checked
            if old.watch is not None and isinstance(model, nn.Module):
                new.watch = old.watch.copied(new, model, dict(copied))
            _mark(new, [parameter for _, parameter in copied])
        return fresh

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_owner"}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Factors:
        fixed = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in fixed.items():
            # a cast to half precision would change thresholds and quantised values: only follow the device
            self._buffers[name] = buffer.to(getattr(self, name).device)
        owner: Attachment | None = self.__dict__.get("_owner")
        if owner is not None and owner.watch is not None:
            adopt(owner)  # torch.__future__.set_overwrite_module_params_on_conversion makes new Parameters
            owner.watch.converted(self)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        owner: Attachment | None = self.__dict__.get("_owner")
        if owner is not None:
            # the model's other modules have been loaded: this one was added last
            _loaded(owner, with_factors=any(key.startswith(prefix) for key in state_dict))


class Attachment:
    """The attribute of a weight that the backend reads: the plan, the factors and the names of the weights."""

    def __init__(self, plan: Plan, factors: Factors, names: dict[int, str]) -> None:
        self.plan = plan
        self.factors = factors
        self.names = names  # id of a Parameter -> site name
        self.marked: tuple[int, ...] = ()  # ids of the Parameters that have this attribute
        self.relaid: tuple[int, ...] = ()  # ids of those that are stored column-major while the plan is attached
        self.unshared: frozenset[int] = frozenset()  # ids of weights that share memory with no other tensor: they may be freed
        self.by_rows: dict[str, str] = {}  # weights that should be stored by columns and are not -> why
        self.checked = False  # whether the weights were compared with the plan's digests
        self.watch: Watch | None = None  # of the model that it is attached to
        self._mark: weakref.ref[_Mark] | None = None
        self.planned = frozenset(base_name(site) for adapter in plan.adapters for site in adapter.sites)
        self._records = records_of(plan)
        self._by_site = {site: (index, adapter) for index, adapter in enumerate(plan.adapters) for site in adapter.sites}

    def __reduce__(self) -> tuple[Any, ...]:
        # ids are not valid in another process: a plan must be attached again after unpickling
        return (_nothing, ())

    def adapter(self, site: str) -> tuple[int, Adapter] | None:
        """(index in the plan, adapter) of a site."""
        return self._by_site.get(site)

    def tensor(self, index: int, key: str) -> Tensor | None:
        """The live factor ``key`` of adapter ``index``."""
        return getattr(self.factors, f"a{index}_{key}", None)

    def marks(self, parameter: nn.Parameter) -> bool:
        """Whether a Parameter has the mark of this attachment."""
        return attachment_of(parameter) is self

    def mark(self, parameter: nn.Parameter) -> bool:
        """Mark a Parameter with this attachment, unless it has the mark of another one; returns whether it was marked."""
        free = attachment_of(parameter) is None
        if free:
            setattr(parameter, ATTRIBUTE, self.current_mark())
        return free

    def current_mark(self) -> _Mark:
        """The mark on the Parameters; a new one where no Parameter has it."""
        mark = None if self._mark is None else self._mark()
        if mark is None:
            mark = _Mark(self)
            self._mark = weakref.ref(mark)
        return mark

    def renew(self, replaced: Mapping[int, int], names: Mapping[int, str]) -> None:
        """Update the records for replaced Parameters. replaced: new id -> old id, equal where a Parameter was not replaced."""
        self.names.clear()
        self.names.update(names)
        self.marked = tuple(replaced)
        self.relaid = tuple(new for new, old in replaced.items() if old in self.relaid)
        self.unshared = frozenset(new for new, old in replaced.items() if new == old and old in self.unshared)

    def dtype_of(self, weight: nn.Parameter) -> torch.dtype | None:
        """The dtype of a weight that the plan was made for."""
        record = self._record(weight)
        return None if record is None else getattr(torch, record.dtype)

    def confirms(self, weight: nn.Parameter) -> bool:
        """Whether a weight has the plan's digest, or there is nothing to compare."""
        record = self._record(weight)
        if record is None or not self.checked or self.dtype_of(weight) != weight.dtype:
            return True
        return weight_digest(weight) == record.digest

    def _record(self, weight: nn.Parameter) -> SiteRecord | None:
        return self._records.get(self.names.get(id(weight), ""))


class _Mark:
    """The attribute of marked Parameters, on which compiled code is guarded. Only Parameters hold a reference to it.

    Once it is removed from the last Parameter, the guards of that code fail.
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
    attachment._mark = None
    mark = attachment.current_mark()
    for parameter in parameters:
        setattr(parameter, ATTRIBUTE, mark)
    forget_invalid()


def _loaded(attachment: Attachment, *, with_factors: bool) -> None:
    """After ``load_state_dict``: warn of weights that the plan is no longer valid for, and let compiled code compile again."""
    watch = attachment.watch
    if watch is None:
        return
    adopt(attachment)
    if with_factors:  # weights and factors of one training
        watch.remember(attachment)
        return
    places = stale_when_loaded(attachment)
    if places:
        report(places.items(), TODO)
        _mark_anew(attachment, watch.parameters().values())


def _mark_anew(attachment: Attachment, parameters: Iterable[nn.Parameter]) -> Attachment:
    """A new attachment of the same plan and factors: code compiled for the old one compiles again."""
    new = Attachment(attachment.plan, attachment.factors, attachment.names)
    new.__dict__.update(attachment.__dict__)
    _mark(new, [parameter for parameter in parameters if attachment.marks(parameter)])
    return new


def invalidate_guards(model: nn.Module) -> None:
    """Give the weights a new attachment of the same plan and factors, so that guards fail and compiled code compiles again."""
    old = attached(unwrap(model))
    assert old is not None
    new = _mark_anew(old, unwrap(model).parameters())
    if new.watch is not None:
        new.watch.remember(new)


def attach(model: nn.Module, plan: Plan | str | Path) -> None:
    """Attach ``plan`` to ``model``, in place of a plan that is attached. Functions compiled before recompile on their next call.

    Weights of the model whose columns the plan skips (neuron adapters without a weight of their own; exact outputs, where the
    weight is stored (in, out)) are column-major while the plan is attached: values, shapes and memory stay, strides change, and
    ``detach`` restores them. (Libraries that save tensors with their strides, such as safetensors, accept contiguous ones only.)

    A ``copy.deepcopy`` of the model is adapted, too; a pickled and loaded one (or one whose Parameters were replaced) is
    not: attach the plan again. ``state_dict`` includes the factors, as ``rana_fx.*``: ``detach`` first for one without.

    Args:
        model: the model that the plan was made for, with the same weights in the same dtype, on any device; it may be wrapped by
            torch.compile or DataParallel. It gets a submodule ``rana_fx`` with the factors, copied from the plan.
        plan: from ``rana_fx.adapt`` or ``rana_fx.load_plan``, or the folder that it was saved to.

    Returns:
        None: ``model`` is changed in place. Only compiled code is adapted; in eager mode the model computes what it did before.

    Raises:
        PlanMismatch: other architecture, shapes, dtype or weights than the plan was made for.
        WeightsFreed: compiled with ``prefill="factors"``. PlanFileError, PlanVersion, InvalidOption: ``plan`` is no plan.
    """
    plan, model = as_plan(plan), unwrap(model)
    parameters = weights_of(model)
    for record in plan.sites:
        check_fit(model, record, parameters.get(base_name(record.name)))
    attach_unchecked(model, plan)
    found = attached(model)
    if found is not None:
        found.checked = True


def attach_unchecked(model: nn.Module, plan: Plan, *, copy: bool = True) -> None:
    """``attach`` without the check that the plan is for these weights.

    ``copy``: False to use the plan's own tensors as factors; training then changes the plan.
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
    with torch.inference_mode(False):  # inference tensors cannot be trained
        attachment = Attachment(plan, Factors(plan, device_of(model), parameters, copy=copy), names)
        relaid = by_columns_((parameters[site] for site in own & parameters.keys()), (*model.parameters(), *model.buffers()))
    attachment.relaid = tuple(map(id, relaid))
    attachment.by_rows = {site: why for site in own if site in parameters and (why := why_by_rows(parameters[site])) is not None}
    attachment.unshared = unshared(model)
    _mark(attachment, [parameter for parameter in model.parameters() if is_ordinary(parameter)])
    ids = {name: id(weight) for name, weight in parameters.items() if is_ordinary(weight)}
    attachment.watch = Watch(model, ids, names)
    attachment.watch.remember(attachment)
    model.add_module(MODULE, attachment.factors.as_part_of(model))


def detach(model: nn.Module) -> Plan | None:
    """Remove the plan from ``model`` and return it (None where none is attached). The model is then as before ``attach``.

    Args:
        model: may be wrapped by torch.compile or DataParallel. Factors that were trained are discarded: the returned plan has
            those that were attached (``rana_fx.training.trained_plan`` returns a plan of trained ones).

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
    """The attachment of a model, or None."""
    return next((found for found in map(attachment_of, model.parameters()) if found is not None), None)


def attachment_of(parameter: Any) -> Attachment | None:
    """The attachment that a Parameter has as its attribute, or None."""
    found = getattr(parameter, ATTRIBUTE, None)
    return found.attachment if isinstance(found, _Mark) else None


def attachments_of(weights: Mapping[fx.Node, nn.Parameter]) -> list[Attachment]:
    """The attachments of a graph's weights. Weights that have replaced marked ones since the last call are marked."""
    found = dict.fromkeys(known for known in map(attachment_of, weights.values()) if known is not None)
    if not found:  # all of them were replaced
        roots = {id(root): root for root in (local(root_of(source_of(node))) for node in weights)}
        held = (module for root in roots.values() if isinstance(root, nn.Module) for module in root.modules())
        owners = (module.__dict__.get("_owner") for module in held if isinstance(module, Factors))
        found = dict.fromkeys(owner for owner in owners if isinstance(owner, Attachment))
    for attachment in found:
        adopt(attachment)
    return list(found)
