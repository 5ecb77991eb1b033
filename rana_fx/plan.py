"""The plan: the frozen result of adaptation, and the only data that is passed from adaptation to compilation.

In: the recipe's adapters and the fingerprint of the weights they were made for. Out: costs, a summary, a digest (part
of the compile-cache key) and, through ``rana_fx.plan_io``, a folder on disk.

Facts on disk are the fields of ``Plan``, ``SiteRecord`` and ``Adapter`` except tensors, which have names such as "0.router", the
adapter's index first. The schema that facts are validated with is derived from the same fields.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor

from rana_fx import plan_check, plan_io, summary
from rana_fx.adapter import TENSORS, Adapter
from rana_fx.cost import METRICS as METRICS
from rana_fx.cost import SCOPES as SCOPES
from rana_fx.cost import Cost, Kept
from rana_fx.curve import Curve
from rana_fx.errors import BadOperand, InvalidOption, PlanFileError, PlanVersion
from rana_fx.skips import Note, Skip, entry, stored


@dataclass(frozen=True)
class SiteRecord:
    """A linear of the model that the plan was made for.

    Attributes:
        name: of its weight. role: by dataflow, such as "up" (rana_fx/graph/roles.py). op: such as "linear" or "matmul".
        transposed: the weight is stored (in, out). uses: how many times a forward pass applies it. counted: by the budget.
        dtype: of the weight. digest: SHA-256 of the weight's bytes, 16 hex digits.
    """

    name: str
    role: str
    op: str
    out_features: int
    in_features: int
    transposed: bool
    uses: int
    counted: bool
    dtype: str
    digest: str

    @property
    def flops(self) -> float:
        """Multiply-adds per token."""
        return float(self.uses * self.out_features * self.in_features)

    @property
    def dense_cost(self) -> Cost:
        """Per token."""
        return Cost(self.flops, self.flops * getattr(torch, self.dtype).itemsize)

    def cost(self, metric: str) -> float:
        """``dense_cost`` in one metric."""
        return self.dense_cost[metric]


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """One adaptation of one model.

    Attributes:
        budget: the target, a fraction of the dense cost in ``metric`` ("flops": multiply-adds, "bytes": weight bytes read).
        tokens: number of calibration tokens, padding not counted.
        scope: which linears the budget counts: "blocks", those inside the blocks; "all", output heads and stems as well.
        sites: every linear found; the budget counts those with ``counted``.
        curve: what this plan, and those of other budgets of the same call, lose on held-out text; None: it was not measured.
        adapters: what replaces linears. skips: linears that are not replaced, with the reason (``left``), and notes on adapted
            ones (``notes``), in one order.
    """

    recipe: str
    metric: str
    budget: float
    seed: int
    tokens: int
    model: str
    versions: dict[str, str]
    sites: tuple[SiteRecord, ...]
    adapters: tuple[Adapter, ...]
    skips: tuple[Skip | Note, ...]
    scope: str = "blocks"
    curve: Curve | None = None

    def __repr__(self) -> str:
        facts = f"recipe={self.recipe!r}, budget={self.budget:g}, metric={self.metric!r}, model={self.model!r}"
        counts = f"{len(self.adapters)} adapters, {len(self.left)} not adapted, {len(self.sites)} linears"
        return f"Plan({facts}, {counts}, digest {self.digest()[:12]})"

    def __str__(self) -> str:
        """About ten lines of at most 80 columns: cost by role, what stays dense, remarks."""
        roles = {site.name: site.role for site in self.sites}
        lines = [
            f"plan {self.digest()[:12]} for {self.model}: recipe {self.recipe}, budget {self.budget:g} in {self.metric}",
            f"  expected cost per token over dense: flops {self.expected_budget('flops'):.3f}, "
            f"bytes {self.expected_budget('bytes'):.3f}" + (", output head included" if self.scope == "all" else ""),
            *summary.by_role_alone(self.adapters, roles, self.metric),
            f"  {len(self.left)} not adapted, of {len(self.sites)} linears found",
            *summary.remarks_in_short(self.skips, most=1),
        ]
        return "\n".join(map(summary.shortened, lines))

    @property
    def dtype(self) -> str:
        """The dtype of most of the weights that it was made for, such as "bfloat16"; "" where it has no linear."""
        sizes: dict[str, int] = {}
        for site in self.sites:
            sizes[site.dtype] = sizes.get(site.dtype, 0) + site.out_features * site.in_features
        return max(sizes, key=lambda name: sizes[name], default="")

    @property
    def dense_cost(self) -> Cost:
        """Per token, of all linears that the budget counts."""
        return sum((site.dense_cost for site in self.sites if site.counted), Cost())

    def expected_budget(
        self,
        metric: str | None = None,
        *,
        kept: Mapping[str, float | Kept] | None = None,
        router_kept: Mapping[str, float] | None = None,
        exact_kept: Mapping[str, float] | None = None,
    ) -> float:
        """Cost per token over the dense cost, in ``metric`` (the plan's own where it is None).

        Args:
            kept: by adapter name, what is kept per token: a ``Kept``, or the mean number of ranks. Default: as calibrated.
            router_kept: mean inputs that masked routers keep. exact_kept: mean outputs computed exactly.

        Raises:
            UnknownMetric.
        """
        metric, dense = metric or self.metric, self.dense_cost
        means = Kept.by_name(kept, router_kept, exact_kept)
        change = sum((adapter.cost(means.get(adapter.name, Kept())) - adapter.dense_cost for adapter in self.adapters), Cost())
        return (dense + change)[metric] / dense[metric] if dense[metric] else 1.0

    def adapter_of(self, site: str) -> Adapter | None:
        """The adapter that replaces a site, if any."""
        return next((adapter for adapter in self.adapters if site in adapter.sites), None)

    @property
    def left(self) -> tuple[Skip, ...]:
        """Linears that are not adapted, with the reason."""
        return tuple(skip for skip in self.skips if isinstance(skip, Skip))

    def notes(self, site: str = "") -> tuple[str, ...]:
        """Notes on the plan as a whole, or on a site that it adapts."""
        return tuple(note.text for note in self.skips if isinstance(note, Note) and note.site == site)

    remarks = notes

    @functools.cached_property
    def _digest(self) -> str:
        state = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode())
        for adapter in self.adapters:
            for name, value in sorted(adapter.tensors().items()):
                # equal bytes represent other numbers in another dtype
                state.update(f"{adapter.name}/{name}/{value.dtype}/{tuple(value.shape)}".encode())
                state.update(tensor_bytes(value))
        return state.hexdigest()

    def digest(self) -> str:
        """SHA-256 over facts and factors: equal for equal plans, also after saving and loading."""
        return self._digest

    def to_dict(self) -> dict[str, Any]:
        """All facts, without tensors; JSON-able."""
        facts = {key: getattr(self, key) for key in ("recipe", "metric", "budget", "seed", "tokens", "model", "versions")}
        if self.scope != "blocks":
            facts["scope"] = self.scope  # plans of the blocks keep the digest that earlier versions gave them
        if self.curve is not None:
            facts["curve"] = asdict(self.curve)
        return facts | {
            "sites": [asdict(site) for site in self.sites],
            "adapters": [adapter_facts(adapter) for adapter in self.adapters],
            "skips": [stored(skip) for skip in self.skips],
        }

    def summary(self, *, all: bool = False) -> str:
        """The plan as text: adapters by kind and role, at most 25 lines and the notes; ``all``: a line for each adapter."""
        kinds: dict[str, int] = {}
        for adapter in self.adapters:
            kinds[adapter.kind] = kinds.get(adapter.kind, 0) + 1
        parts = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no adapters"
        head, of_all = f"plan {self.digest()[:12]} for {self.model}: recipe {self.recipe}", self.scope == "all"
        lines = [
            f"{head}, budget {self.budget:g} in {self.metric}" + (", output head included" if of_all else ""),
            f"  {parts}; {sum(site.counted for site in self.sites)} linears in the budget, {len(self.left)} not adapted",
            "  expected cost per token over dense: "
            f"flops {self.expected_budget('flops'):.3f}, bytes {self.expected_budget('bytes'):.3f}",
        ]
        lines += [f"  {text}" for text in ([] if self.curve is None else self.curve.lines(self.budget))]
        lines += [f"  note: {text}" for text in self.notes()]
        if all:
            return "\n".join([*lines, *summary.one_by_one(self.adapters)])
        roles = {site.name: site.role for site in self.sites}
        return "\n".join([*lines, *summary.by_role(self.adapters, roles, self.metric, self.dense_cost)])

    def save(self, path: str | Path) -> None:
        """Write to a folder, atomically: an interrupted or failed save leaves an older plan there intact.

        Raises:
            PlanWriteError.
        """
        exact = any(adapter.exact_tau is not None for adapter in self.adapters)
        number = plan_io.SCOPE if self.scope != "blocks" else plan_io.EXACT if exact else plan_io.BEFORE
        number = number if self.curve is None else plan_io.FORMAT
        tensors = {f"{i}.{key}": value for i, a in enumerate(self.adapters) for key, value in a.tensors().items()}
        plan_io.write(plan_io.Stored(number, self.digest(), self.to_dict(), tensors), Path(path))


def load_plan(path: str | Path) -> Plan:
    """Read a plan that ``Plan.save`` wrote; no pickle is involved.

    Args:
        path: the folder.

    Returns:
        The plan, with tensors on the CPU; its digest is that of the saved one.

    Raises:
        PlanFileError: the folder holds no plan, or one that is incomplete or was changed.
        PlanVersion: the plan was written in a format that this version does not read.
    """
    folder = Path(path)
    found = plan_io.read(folder, _SCHEMA)
    try:
        return _checked(folder, found)
    except (PlanFileError, PlanVersion):
        raise
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise PlanFileError(path=folder, reason=str(error)) from error


def as_plan(given: Plan | str | Path) -> Plan:
    """The plan itself, or the one in the folder of that name. Raises InvalidOption, PlanFileError, PlanVersion."""
    if isinstance(given, Plan):
        return given
    if isinstance(given, (str, Path)):
        return load_plan(given)
    raise InvalidOption(name="plan", got=given, expected="a rana_fx.Plan, or the folder of a saved one")


def _checked(folder: Path, found: plan_io.Stored) -> Plan:
    """Raises PlanFileError, ValueError, and what making a plan of wrong facts raises."""
    facts: dict[str, Any] = {field.name: getattr(found.facts, field.name) for field in dataclasses.fields(Plan)}
    try:
        facts["adapters"] = tuple(_adapter(i, one, found.tensors) for i, one in enumerate(found.facts.adapters))
    except (KeyError, AssertionError, BadOperand) as error:
        raise PlanFileError(path=folder, reason=f"facts and tensors do not belong together ({error})") from error
    facts["skips"] = tuple(entry(skip.site, skip.reason) for skip in found.facts.skips)
    plan = Plan(**facts)
    for adapter in plan.adapters:
        _check_sites(folder, plan, adapter)
    plan_check.check(plan, found.tensors)
    if plan.digest() != found.digest:
        raise PlanFileError(path=folder, reason="its content does not match its digest: it was changed after it was saved")
    return plan


def adapter_facts(adapter: Adapter) -> dict[str, Any]:
    """An adapter's facts without tensors."""
    facts = {field.name: getattr(adapter, field.name) for field in dataclasses.fields(adapter) if field.name not in TENSORS}
    if adapter.exact_kept is None:
        del facts["exact_kept"]  # plans without exact outputs keep the digest that earlier versions gave them
    return {key: list(value) if isinstance(value, tuple) else value for key, value in facts.items()}


_LATER = {"exact_kept": None, "scope": "blocks", "curve": None}  # facts that are left out where they have these values


def _facts_type(name: str, source: type, **changed: Any) -> Any:
    """A dataclass of the fields of ``source`` except tensors. All are required except those that earlier plans do not have."""
    found = {key: value for key, value in typing.get_type_hints(source).items() if key not in TENSORS} | changed
    names = [field.name for field in dataclasses.fields(source) if field.name in found]
    fields: list[Any] = [(key, found[key]) for key in names if key not in _LATER]
    fields += [(key, found[key], _LATER[key]) for key in names if key in _LATER]
    return dataclasses.make_dataclass(name, fields, frozen=True)


_AdapterFacts = _facts_type("_AdapterFacts", Adapter)
_Facts = _facts_type("_Facts", Plan, adapters=types.GenericAlias(tuple, (_AdapterFacts, ...)), skips=tuple[Skip, ...])
_SCHEMA: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(_Facts)


def _adapter(index: int, facts: Any, tensors: Mapping[str, Tensor]) -> Adapter:
    """Raises KeyError, AssertionError, BadOperand where facts and tensors do not belong together."""
    own: dict[str, Any] = {key: tensors.get(f"{index}.{key}") for key in TENSORS if key != "tau"}
    fields: dict[str, Any] = {field.name: getattr(facts, field.name) for field in dataclasses.fields(facts)}
    return Adapter(**fields, tau=tensors[f"{index}.tau"], **own)


def _check_sites(folder: Path, plan: Plan, adapter: Adapter) -> None:
    """Check that an adapter has the sizes of the linears it replaces. Raises PlanFileError."""
    records = {record.name: record for record in plan.sites}
    unknown = [site for site in (*adapter.sites, *adapter.also) if site not in records]
    if unknown:
        raise PlanFileError(path=folder, reason=f"adapter {adapter.name} replaces {unknown[0]}, which is not among its linears")
    sites = [records[site] for site in adapter.sites]
    out, widths = sum(site.out_features for site in sites), {site.in_features for site in sites}
    if widths != {adapter.width}:
        reason = f"adapter {adapter.name} reads {adapter.width} inputs, its linears {' and '.join(map(str, sorted(widths)))}"
        raise PlanFileError(path=folder, reason=reason)
    if adapter.out not in (None, out):
        raise PlanFileError(path=folder, reason=f"adapter {adapter.name} makes {adapter.out} outputs, its linears {out}")


def tensor_bytes(value: Tensor) -> memoryview:
    """The bytes of a tensor, in row-major order."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def weight_digest(weight: Tensor) -> str:
    """SHA-256 of a weight's bytes, shortened to 16 hex digits."""
    return hashlib.sha256(tensor_bytes(weight)).hexdigest()[:16]
