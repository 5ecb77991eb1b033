"""A plan given to the backend as an option, ``options={"plan": plan}``, instead of attached to the model.

In: a plan or its folder, and the weights of one graph. Out: an ``Attachment`` with the names of those weights that the
plan was made for. Names alone do not identify a weight: they are relative to the compiled module (``gate_proj`` when an MLP is
compiled by itself), so a weight is matched with the site whose name has the same end and whose digest is that of its bytes. The
model is not changed; to train factors, attach the plan instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from rana_fx.errors import InvalidOption, PlanMismatch
from rana_fx.graph.linears import source_name
from rana_fx.graph.names import attribute_at
from rana_fx.graph.operands import base_name
from rana_fx.modules import unwrap, weights_of
from rana_fx.ordinary import has_data
from rana_fx.plan import Plan, SiteRecord, weight_digest
from rana_fx.runtime.attachment import Attachment, Factors
from rana_fx.runtime.changed_weights import CHANGED, GONE, Seen, not_ordinary
from rana_fx.runtime.plan_fit import records_of
from rana_fx.runtime.plan_folder import Folder, compiled_with

_ATTACHMENTS = "_rana_fx_attachments"  # of a plan: device -> its factors there


@dataclass(frozen=True)
class _Known:
    """The identified site of a weight, valid while the weight equals ``seen``. Hashing takes about a second per gigabyte."""

    site: str | None
    seen: Seen

    def holds(self, now: Seen) -> bool:
        return not self.seen.moved(now) and self.seen.equals(now)


_sites: WeakKeyDictionary[Plan, WeakTensorKeyDictionary] = WeakKeyDictionary()


def plan_of(options: Mapping[str, Any]) -> Plan | None:
    """The plan among the options of the current compilation, or the one in the folder given there; None where there is none.

    Raises:
        InvalidOption, PlanFileError, PlanVersion.
    """
    if "plan" not in options:
        return None
    value = options["plan"]
    if isinstance(value, Plan):
        return value
    if isinstance(value, (str, Path, Folder)):
        folder = Folder(value.path if isinstance(value, Folder) else Path(value))
        plan = folder.load()
        compiled_with(options, folder)
        return plan
    raise InvalidOption(name="plan", got=value, expected="a rana_fx.Plan, or the folder of a saved one")


def attachment_for(plan: Plan, weights: Mapping[fx.Node, nn.Parameter]) -> Attachment | None:
    """The attachment of ``plan`` for the weights of one graph; None where none of them is in the plan.

    Raises:
        PlanMismatch: a weight has the name of a site and other bytes, or is quantised or wrapped.
    """
    device = next((weight.device for weight in weights.values()), torch.device("cpu"))
    found, sites = _attachment(plan, device), _sites.setdefault(plan, WeakTensorKeyDictionary())
    matched = False
    for node, weight in weights.items():
        site = _known_site(plan, source_name(node), weight, sites)
        found.names.pop(id(weight), None)  # the id may have belonged to a weight that was deleted
        if site is not None:
            found.names[id(weight)] = site
            matched = True
    return found if matched else None


def _attachment(plan: Plan, device: torch.device) -> Attachment:
    """One set of factors serves every graph (prefill, decode) that is compiled by a plan. It is freed with the plan."""
    made: dict[torch.device, Attachment] = plan.__dict__.setdefault(_ATTACHMENTS, {})
    if device not in made:
        made[device] = Attachment(plan, Factors(plan, device), {})
    return made[device]


def _known_site(plan: Plan, name: str, weight: nn.Parameter, sites: WeakTensorKeyDictionary) -> str | None:
    if not has_data(weight):
        _refuse_wrapped(plan, name, weight)
        return None
    now = Seen.of(weight)
    known: _Known | None = sites.get(weight)
    if known is None or now is None or not known.holds(now):
        site = _site(plan, name, weight)
        if now is None:
            return site
        sites[weight] = known = _Known(site, now)
    return known.site


def _alike(name: str, known: str) -> bool:
    return f".{known}".endswith(f".{name}") or f".{name}".endswith(f".{known}")


def _refuse_wrapped(plan: Plan, name: str, weight: nn.Parameter) -> None:
    """Raises PlanMismatch where the plan has a linear of that name and does not record it as wrapped when the plan was made."""
    sites = records_of(plan)
    alike = [known for known in sites if _alike(name, known)]
    if weight.dim() < 2 or not alike or any(_alike(name, base_name(skip.site)) for skip in plan.left if skip.site not in sites):
        return
    raise not_ordinary("the model being compiled", name, weight, sites[alike[0]].dtype)


def _site(plan: Plan, name: str, weight: nn.Parameter) -> str | None:
    """The plan's name of a weight (several sites may be parts of it), or None."""
    names = records_of(plan)
    if not any(record.out_features * record.in_features <= weight.numel() for record in plan.sites) or weight.dim() < 2:
        return None
    alike = {known: record for known, record in names.items() if _alike(name, known)}
    digest = weight_digest(weight)
    for other, record in (alike | names).items():
        if record.digest == digest:
            return other
    if not alike:
        return None
    expected = f"a weight with digest {' or '.join(record.digest for record in list(alike.values())[:3])}"
    raise PlanMismatch(model="the model being compiled", site=name, got=f"digest {digest}", expected=expected)


def gone(plan: Plan, models: Iterable[nn.Module]) -> Iterator[tuple[str, str]]:
    """(site, reason) of planned linears of these models, or of the whole whose parts they are, that lost the plan's weight.

    Other Parameters of the planned shape in the place of a weight are refused where a graph has them (``attachment_for``).
    """
    sites, records = _sites.setdefault(plan, WeakTensorKeyDictionary()), records_of(plan)
    planned = dict.fromkeys(base_name(site) for adapter in plan.adapters for site in adapter.sites)
    for model in map(unwrap, models):
        weights = weights_of(model)
        known = {name: sites[weight].site for name, weight in weights.items() if weight in sites}
        for site in (site for site in planned if site not in known.values()):
            for name in _names_in(model, site, known, planned):
                reason = _why_gone(model, name, weights, records[site])
                if reason is not None:
                    yield site, reason


def _names_in(model: nn.Module, site: str, known: Mapping[str, str | None], planned: Iterable[str]) -> list[str]:
    """What the weight of a site is called in a model, by those of its weights that are known: name in the model -> site."""
    found: dict[str, None] = {}
    for name, other in known.items():
        if other is None:
            continue
        if f".{other}".endswith(f".{name}"):  # the model is a part of the one that the plan was made for
            prefix = other.removesuffix(name)
            if site.startswith(prefix):
                found[site.removeprefix(prefix)] = None
        elif name.endswith(f".{other}"):
            found[name.removesuffix(other) + site] = None
    if not found and all(attribute_at(model, one) is not None for one in planned):
        found[site] = None
    return list(found)


def _why_gone(model: nn.Module, name: str, weights: Mapping[str, nn.Parameter], record: SiteRecord) -> str | None:
    """Why a place in a model does not have the weight of a site; None where it may, or where there is no such place."""
    weight = weights.get(name)
    if weight is not None:
        smaller = has_data(weight) and weight.numel() < record.out_features * record.in_features
        return CHANGED if smaller else None
    place = attribute_at(model, name)
    if place is None:
        return None
    inside = [
        weight for other, weight in weights.items() if other.startswith(f"{name}.") and weight.dim() > 1 and has_data(weight)
    ]
    return None if any(weight_digest(weight) == record.digest for weight in inside) else GONE
