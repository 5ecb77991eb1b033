"""Notice that weights of an attached plan were replaced or changed since it was attached.

In: an attachment and its model, at every compilation and after every ``load_state_dict``. Out: Parameters that took the place of
marked ones are marked, so that their linears are known; and for a weight with other numbers the reason why its adapter no longer
stands for it. Nothing is looked at when compiled code runs.

A weight is compared by its version counter, its address and a sample of at most 64 x 64 of its numbers, since a write through
``weight.data`` shows in the numbers alone. A cast of model and factors together changes neither. Training changes weights as
well: what is multiplied by the model's own weight may change while it requires gradients, and so may whatever changes together
with its factors (training, averages of models, checkpoints that hold both).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rana_fx.adapter import Adapter
from rana_fx.dense_memory import is_freed
from rana_fx.errors import PlanMismatch
from rana_fx.modules import weights_of
from rana_fx.ordinary import has_data, is_ordinary, wrapped

if TYPE_CHECKING:
    from rana_fx.runtime.attachment import Attachment

TODO = (
    "A plan is valid only for the weights it was made for: make one for these with rana_fx.detach(model) and rana_fx.adapt, or "
    "load the checkpoint that it was made for and attach it again."
)
CHANGED = "its weight has other values than when the plan was attached"
_SIDE = 64


@dataclass(frozen=True, eq=False)
class Seen:
    """A weight as it was: where, in which version, and some of its numbers, on the CPU."""

    pointer: int
    version: int | None
    sample: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Seen | None:
        """None where there are no numbers to see."""
        if not has_data(weight) or is_freed(weight):
            return None
        version = version_of(weight)
        values = weight.detach()[tuple(slice(None, None, max(1, size // _SIDE)) for size in weight.shape)]
        return cls(weight.data_ptr(), version, values.to("cpu", copy=True))

    def moved(self, now: Seen) -> bool:
        """Whether something may have been written since, or the numbers are elsewhere."""
        return (self.pointer, self.version) != (now.pointer, now.version)

    def equals(self, now: Seen) -> bool:
        """Whether the sampled numbers are the same, in the dtype that they now have."""
        if self.sample.shape != now.sample.shape:
            return False
        before = self.sample.to(now.sample.dtype)
        return bool(((before == now.sample) | (before.isnan() & now.sample.isnan())).all())


class Watch:
    """What an attachment remembers of its model.

    ids: name -> id of the Parameter there, of all that are marked. seen: id -> the weight, of those that adapters stand for.
    """

    def __init__(self, model: nn.Module, ids: Mapping[str, int]) -> None:
        self.model = weakref.ref(model)
        self.ids = dict(ids)
        self.seen: dict[int, Seen] = {}
        self.foreign: set[int] = set()  # loaded without factors, so not by a training
        self.wrapped: dict[str, str] = {}  # sites whose weights were replaced by what is not ordinary -> what they are
        self._factors: dict[str, tuple[int, int | None, torch.dtype]] = {}

    def remember(self, attachment: Attachment) -> None:
        """The weights, and the factors, are right as they are now."""
        self._factors = _versions(attachment.factors)
        planned = {id_ for id_, name in attachment.names.items() if name in attachment.planned}
        self.seen = {
            id(parameter): seen
            for parameter in self.parameters().values()
            if id(parameter) in planned and (seen := Seen.of(parameter)) is not None
        }
        self.foreign = set()

    def converted(self) -> None:
        """After a cast or a move of the whole model: what is the same but for that is remembered as it is now."""
        for parameter in self.parameters().values():
            before = self.seen.get(id(parameter))
            now = None if before is None else Seen.of(parameter)
            if before is not None and now is not None and before.equals(now):
                self.seen[id(parameter)] = now

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Of the model as it now is."""
        model = self.model()
        return {} if model is None else weights_of(model)

    def retrained(self, index: int, factors: nn.Module) -> bool:
        """Whether factors of an adapter were written since."""
        prefix = f"a{index}_"
        now = {name: facts for name, facts in _versions(factors).items() if name.startswith(prefix)}
        return any(self._factors.get(name) != facts for name, facts in now.items())

    def copied(self, model: nn.Module, factors: nn.Module, parameters: Mapping[int, nn.Parameter]) -> Watch:
        """The same of a deep copy, whose Parameters are given by the ids of the original's."""
        twin = Watch(model, {name: id(parameters[key]) for name, key in self.ids.items() if key in parameters})
        twin._factors = _versions(factors)
        for key, before in self.seen.items():
            now = Seen.of(parameters[key]) if key in parameters else None
            if now is not None:
                twin.seen[id(parameters[key])] = now if before.equals(now) else before
        return twin


def version_of(tensor: Tensor) -> int | None:
    """How often it was written, as far as PyTorch counts; None for tensors of inference mode, whose writes it does not count."""
    try:
        return tensor._version
    except RuntimeError:
        return None


def _versions(factors: nn.Module) -> dict[str, tuple[int, int | None, torch.dtype]]:
    named = {**dict(factors.named_parameters(recurse=False)), **dict(factors.named_buffers(recurse=False))}
    return {name: (value.data_ptr(), version_of(value), value.dtype) for name, value in named.items() if is_ordinary(value)}


def why_stale(attachment: Attachment, weight: nn.Parameter, index: int, adapter: Adapter) -> str | None:
    """Why an adapter does not stand for a weight any more; None where it does. The linear is then computed by the weight."""
    watch = attachment.watch
    if watch is None or not has_data(weight):
        return None
    unfit = _unfit(attachment, weight, index, adapter)
    before, now = watch.seen.get(id(weight)), Seen.of(weight)
    if unfit is not None or before is None or now is None:
        return unfit
    trained = adapter.reads_model and weight.requires_grad or watch.retrained(index, attachment.factors)
    if trained and id(weight) not in watch.foreign:
        return None
    if before.equals(now) and (not before.moved(now) or attachment.confirms(weight)):
        watch.seen[id(weight)] = now
        return None
    return CHANGED


def _unfit(attachment: Attachment, weight: nn.Parameter, index: int, adapter: Adapter) -> str | None:
    """Where weight and factors were moved or cast apart."""
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
    """Mark the Parameters that took the places of marked ones, under the names of those."""
    watch = attachment.watch
    if watch is None:
        return
    parameters, watch.wrapped = watch.parameters(), {}
    gone = set()
    for name, parameter in parameters.items():
        old = watch.ids.get(name)
        if old is None or (id(parameter) == old and attachment.marks(parameter)):
            continue
        if not is_ordinary(parameter):
            site = attachment.names.get(old)
            if site is not None:
                watch.wrapped[site] = wrapped(parameter)
            continue
        if attachment.adopt(parameter, old):
            watch.ids[name] = id(parameter)
            gone.add(old)
            if old in watch.seen:
                watch.seen.setdefault(id(parameter), watch.seen[old])
    present = set(map(id, parameters.values()))
    for name, old in watch.ids.items():
        if name not in parameters and old not in present and old in attachment.names:
            watch.wrapped[attachment.names[old]] = "its weight is no longer a Parameter of the model"
    # an id may become that of another tensor
    for old in gone - present:
        attachment.names.pop(old, None)
        watch.seen.pop(old, None)


def gone(attachment: Attachment) -> list[tuple[str, str]]:
    """(site, reason) of planned weights in whose place there is now something that is no ordinary Parameter."""
    watch = attachment.watch
    return [] if watch is None else [(site, why) for site, why in watch.wrapped.items() if site in attachment.planned]


def not_ordinary(model: str, site: str, weight: Tensor, dtype: str) -> PlanMismatch:
    """The error where the plan has a linear whose weight has no numbers of its own."""
    got = "a weight without data (on the meta device)" if is_ordinary(weight) else f"a {wrapped(weight)}"
    expected = f"an ordinary {dtype} weight; the plan was made before it was quantised, wrapped, sharded or offloaded"
    return PlanMismatch(model=model, site=site, got=got, expected=expected)
