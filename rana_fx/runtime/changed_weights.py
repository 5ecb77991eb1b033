"""Detect weights of an attached plan that were replaced or changed after the plan was attached.

In: an attachment and its model, at every compilation and after every ``load_state_dict``. Out: Parameters that replaced marked
ones are marked, so that their linears are recognised; and for a weight with changed values, the reason why its adapter is no
longer valid. Nothing is checked when compiled code runs.

A weight is compared by its version counter, its address and a sample of at most 64 x 64 of its values, since a write through
``weight.data`` changes the values alone. A cast of model and factors together does not count as a change. Training changes
weights too: a weight that its adapter reads may change while it requires gradients, and so may a weight that changes together
with the factors of its adapter (training, averages of models, checkpoints that hold both).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from rana_fx.adapter import Adapter
from rana_fx.dense_memory import is_freed
from rana_fx.errors import PlanMismatch
from rana_fx.formats import is_plain
from rana_fx.graph.operands import base_name
from rana_fx.modules import weights_of
from rana_fx.ordinary import has_data, is_ordinary, wrapped

if TYPE_CHECKING:
    from rana_fx.runtime.attachment import Attachment

TODO = (
    "A plan is valid only for the weights it was made for: make one for these with rana_fx.detach(model) and rana_fx.adapt, or "
    "load the checkpoint that it was made for and attach it again."
)
GONE = "its weight is no longer a Parameter of the model"
PLAIN = "its weight is a tensor in the place of the model's Parameter (torch.func.functional_call, FSDP): it runs dense"
CHANGED = "its weight has other values than when the plan was attached"
ADDED = "it has a bias, and had none when the plan was made"
BIAS = "its bias was added, replaced or written since the plan was attached, and the adapter computes with the one from before"
_SIDE = 64


@dataclass(frozen=True, eq=False)
class Seen:
    """A snapshot of a weight: its address, its version counter, and a sample of its values, on the CPU."""

    pointer: int
    version: int | None
    sample: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Seen | None:
        """The snapshot; None where the weight has no data."""
        if not has_data(weight) or is_freed(weight):
            return None
        version = version_of(weight)
        steps = [max(1, size // _SIDE) if weight.dim() > 1 else 1 for size in weight.shape]  # of a bias, all
        values = weight.detach()[tuple(slice(None, None, step) for step in steps)]
        return cls(weight.data_ptr(), version, values.to("cpu", copy=True))

    def moved(self, now: Seen) -> bool:
        """Whether the weight may have been written since, or has another address."""
        return (self.pointer, self.version) != (now.pointer, now.version)

    def equals(self, now: Seen) -> bool:
        """Whether the sampled values are equal in the current dtype; NaN equals NaN."""
        if self.sample.shape != now.sample.shape:
            return False
        before = self.sample.to(now.sample.dtype)
        return bool(((before == now.sample) | (before.isnan() & now.sample.isnan())).all())


class Watch:
    """The state of a model's Parameters and factors that later states are compared with.

    ids: name in the model -> id of the Parameter of that name, for all marked Parameters. sites: name in the model -> name of the
    weight in the plan. seen: id -> snapshot, for the weights that adapters replace.
    """

    def __init__(self, model: nn.Module, ids: Mapping[str, int], names: Mapping[int, str]) -> None:
        self.model = weakref.ref(model)
        self.ids = dict(ids)
        self.sites = {path: names[id_] for path, id_ in ids.items() if id_ in names}
        self.seen: dict[int, Seen] = {}
        self.foreign: set[int] = set()  # ids of weights that were loaded without factors, so not changed by training
        self.wrapped: dict[str, str] = {}  # sites whose weights were replaced by tensors that are not ordinary -> description
        self._factors: dict[str, Seen] = {}

    def remember(self, attachment: Attachment) -> None:
        """Record the current weights and factors as those of the plan."""
        self._factors = _seen(attachment.factors)
        planned = {id_ for id_, name in attachment.names.items() if name in attachment.planned}
        self.seen = {
            id(parameter): seen
            for parameter in self.parameters().values()
            if (id(parameter) in planned or parameter.dim() == 1) and (seen := Seen.of(parameter)) is not None
        }
        self.foreign = set()

    def converted(self, factors: nn.Module) -> None:
        """After a cast or a move of the whole model, record new snapshots of weights and factors whose values are the same."""
        for name, seen in _seen(factors).items():
            if name in self._factors and self._factors[name].equals(seen):
                self._factors[name] = seen
        for parameter in self.parameters().values():
            before = self.seen.get(id(parameter))
            now = None if before is None else Seen.of(parameter)
            if before is not None and now is not None and before.equals(now):
                self.seen[id(parameter)] = now

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The current Parameters of the model by name; empty where the model was freed."""
        model = self.model()
        return {} if model is None else weights_of(model)

    def retrained(self, attachment: Attachment, index: int, adapter: Adapter) -> bool:
        """Whether factors of an adapter have other values than recorded."""
        for key in adapter.tensors():
            before, factor = self._factors.get(f"a{index}_{key}"), attachment.tensor(index, key)
            now = None if before is None or factor is None else Seen.of(factor)
            if before is not None and now is not None and not before.equals(now):
                return True
        return False

    def copied(self, twin: Attachment, model: nn.Module, parameters: Mapping[int, nn.Parameter]) -> Watch:
        """The state of a deep copy. ``parameters``: id of a Parameter of the original -> its copy."""
        factors, ids = twin.factors, {name: id(parameters[key]) for name, key in self.ids.items() if key in parameters}
        watch = Watch(model, ids, twin.names)
        watch._factors = _seen(factors)
        for key, before in self.seen.items():
            now = Seen.of(parameters[key]) if key in parameters else None
            if now is not None:
                watch.seen[id(parameters[key])] = now if before.equals(now) else before
        return watch


def version_of(tensor: Tensor) -> int | None:
    """PyTorch's version counter of a tensor; None for tensors of inference mode, which have none."""
    try:
        return tensor._version
    except RuntimeError:
        return None


def _seen(factors: nn.Module) -> dict[str, Seen]:
    named = {**dict(factors.named_parameters(recurse=False)), **dict(factors.named_buffers(recurse=False))}
    return {name: seen for name, value in named.items() if (seen := Seen.of(value)) is not None}


def why_stale(attachment: Attachment, weight: nn.Parameter, index: int, adapter: Adapter) -> str | None:
    """The reason why an adapter is no longer valid for a weight, and the linear runs dense; None where the adapter is valid."""
    watch = attachment.watch
    if watch is None or not has_data(weight):
        return None
    unfit = _unfit(attachment, weight, index, adapter)
    before, now = watch.seen.get(id(weight)), Seen.of(weight)
    if unfit is not None or before is None or now is None:
        return unfit
    trained = adapter.reads_model and weight.requires_grad or watch.retrained(attachment, index, adapter)
    if trained and id(weight) not in watch.foreign:
        return None
    if before.equals(now) and (not before.moved(now) or attachment.confirms(weight)):
        watch.seen[id(weight)] = now
        return None
    return CHANGED


def why_bias_stale(attachment: Attachment, bias: nn.Parameter | None, index: int, adapter: Adapter) -> str | None:
    """Why an adapter that computes with a bias of its own does not stand for a linear with this one; None where it does."""
    watch = attachment.watch
    if bias is None or not has_data(bias) or (adapter.weight is None and adapter.bias is None):
        return None
    if adapter.bias is None and bool(bias.detach().any()):
        return ADDED
    if watch is None:
        return None
    before, now = watch.seen.get(id(bias)), Seen.of(bias)
    if before is not None and now is not None and before.equals(now):
        return None
    return None if before is not None and watch.retrained(attachment, index, adapter) else BIAS


def _unfit(attachment: Attachment, weight: nn.Parameter, index: int, adapter: Adapter) -> str | None:
    """The reason where the device or dtype of a weight no longer fits the factors; else None."""
    for key in adapter.tensors():
        factor = attachment.tensor(index, key)
        if factor is None:
            continue
        if factor.device != weight.device:
            return f"its weight is on {weight.device}, its factors are on {factor.device}; move the whole model"
        cast = weight.dtype not in (factor.dtype, attachment.dtype_of(weight))
        if key in adapter.trained and cast:
            return f"its weight is {weight.dtype}, its factors are {factor.dtype}; cast the whole model"
    return None


def adopt(attachment: Attachment) -> None:
    """Mark the Parameters that replaced marked ones, under the same names."""
    watch = attachment.watch
    if watch is None or watch.model() is None:  # Parameters may outlive their model
        return
    parameters, before = watch.parameters(), dict(watch.ids)
    replaced: dict[int, int] = {}  # new id -> id of the replaced Parameter; Python may reuse ids of freed tensors
    watch.wrapped = {}
    for path, old in before.items():
        parameter, site = parameters.get(path), watch.sites.get(path)
        if parameter is None or not is_ordinary(parameter):
            if site is not None and (parameter is not None or old not in map(id, parameters.values())):
                watch.wrapped[site] = GONE if parameter is None else wrapped(parameter)
        elif not isinstance(parameter, nn.Parameter):  # as long as functional_call runs a compiled model
            if site is not None:
                watch.wrapped[site] = PLAIN
        elif site in attachment.planned and id(parameter) != old and not is_plain(parameter):
            watch.wrapped[site] = f"quantised weight ({parameter.dtype})"
        elif attachment.marks(parameter) or attachment.mark(parameter):
            watch.ids[path] = id(parameter)
            replaced[id(parameter)] = old
    if all(new == old for new, old in replaced.items()):
        return
    attachment.renew(replaced, {watch.ids[path]: site for path, site in watch.sites.items() if watch.ids[path] in replaced})
    watch.seen = {new: watch.seen[old] for new, old in replaced.items() if old in watch.seen}


def stale_when_loaded(attachment: Attachment) -> dict[str, str]:
    """Sites for whose weights the plan is no longer valid after a checkpoint without factors was loaded -> the reason."""
    watch, stale = attachment.watch, dict(gone(attachment))
    parameters = {} if watch is None else watch.parameters()
    for site in (site for adapter in attachment.plan.adapters for site in adapter.sites):
        weight, planned = parameters.get(base_name(site)), attachment.adapter(site)
        if watch is None or weight is None or planned is None:
            continue
        before = watch.foreign
        watch.foreign = before | {id(weight)}
        reason = why_stale(attachment, weight, *planned)
        bias = parameters.get(f"{base_name(site)}.bias")
        reason = reason or why_bias_stale(attachment, bias, *planned)
        if reason is None:
            watch.foreign = before
        else:
            stale[site] = reason
    return stale


def gone(attachment: Attachment) -> list[tuple[str, str]]:
    """(site, reason) of planned weights that were removed, or replaced by something other than an ordinary Parameter."""
    watch = attachment.watch
    return [] if watch is None else [(site, why) for site, why in watch.wrapped.items() if site in attachment.planned]


def not_ordinary(model: str, site: str, weight: Tensor, dtype: str) -> PlanMismatch:
    """The error for a planned linear whose weight is not an ordinary tensor with data."""
    got = "a weight without data (on the meta device)" if is_ordinary(weight) else f"a {wrapped(weight)}"
    expected = f"an ordinary {dtype} weight; the plan was made before it was quantised, wrapped, sharded or offloaded"
    return PlanMismatch(model=model, site=site, got=got, expected=expected)
