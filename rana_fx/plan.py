"""The plan: what adaptation decided, frozen. The only thing that crosses from adaptation to compilation.

In: the recipe's adapters and the fingerprint of the weights they were made for. Out: costs, a summary, a digest (part
of the compile-cache key) and, through ``rana_fx.plan_io``, a folder on disk.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rana_fx.adapter import TENSORS, Adapter
from rana_fx.graph.linears import REMARK, Skip

METRICS = ("flops", "bytes")


@dataclass(frozen=True)
class SiteRecord:
    """A linear of the model the plan was made for. ``digest``: of the weight's bytes; flops: multiply-adds per token."""

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
        return float(self.uses * self.out_features * self.in_features)

    def cost(self, metric: str) -> float:
        """Dense cost per token."""
        width = getattr(torch, self.dtype).itemsize if metric == "bytes" else 1
        return self.flops * width


@dataclass(frozen=True, eq=False)
class Plan:
    """One adaptation of one model.

    Attributes:
        budget: asked, a fraction of the dense cost in ``metric`` ("flops": multiply-adds, "bytes": weight bytes read).
        tokens: calibration tokens seen, padding not counted.
        sites: every linear found; those with ``counted`` make up the budget.
        adapters: what is replaced. skips: what is not, and why; and remarks on the plan (``remarks``).
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
    skips: tuple[Skip, ...]

    def expected_budget(
        self,
        metric: str | None = None,
        *,
        kept: Mapping[str, float] | None = None,
        router_kept: Mapping[str, float] | None = None,
        exact_kept: Mapping[str, float] | None = None,
    ) -> float:
        """Cost per token over the dense cost.

        Args:
            kept: mean kept ranks by adapter name; default as calibrated. router_kept: mean inputs that masked routers keep.
                exact_kept: mean outputs computed exactly.
        """
        metric = metric or self.metric
        dense = sum(site.cost(metric) for site in self.sites if site.counted)
        counts = [means or {} for means in (kept, router_kept, exact_kept)]
        change = sum(
            adapter.cost(metric, *(means.get(adapter.name) for means in counts))
            - (adapter.dense_flops if metric == "flops" else adapter.dense_bytes)
            for adapter in self.adapters
        )
        return (dense + change) / dense if dense else 1.0

    def adapter_of(self, site: str) -> Adapter | None:
        """The adapter that replaces a site, if any."""
        return next((adapter for adapter in self.adapters if site in adapter.sites), None)

    @property
    def left(self) -> tuple[Skip, ...]:
        """What is not adapted, and why."""
        return tuple(skip for skip in self.skips if not skip.site.startswith(REMARK))

    def remarks(self, site: str = "") -> tuple[str, ...]:
        """What a user should know of the plan as a whole, or of a site that it adapts."""
        return tuple(skip.reason for skip in self.skips if skip.site == REMARK + site)

    @functools.cached_property
    def _digest(self) -> str:
        state = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode())
        for adapter in self.adapters:
            for name, value in sorted(adapter.tensors().items()):
                # the same bytes are other numbers in another dtype
                state.update(f"{adapter.name}/{name}/{value.dtype}/{tuple(value.shape)}".encode())
                state.update(tensor_bytes(value))
        return state.hexdigest()

    def digest(self) -> str:
        """SHA-256 over facts and factors: equal for equal plans, also after saving and loading."""
        return self._digest

    def to_dict(self) -> dict[str, Any]:
        """All facts, without tensors; JSON-able."""
        facts = {key: getattr(self, key) for key in ("recipe", "metric", "budget", "seed", "tokens", "model", "versions")}
        return facts | {
            "sites": [asdict(site) for site in self.sites],
            "adapters": [adapter_facts(adapter) for adapter in self.adapters],
            "skips": [asdict(skip) for skip in self.skips],
        }

    def summary(self) -> str:
        """A few lines for people."""
        kinds: dict[str, int] = {}
        for adapter in self.adapters:
            kinds[adapter.kind] = kinds.get(adapter.kind, 0) + 1
        parts = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no adapters"
        lines = [
            f"plan {self.digest()[:12]} for {self.model}: recipe {self.recipe}, budget {self.budget:g} in {self.metric}",
            f"  {parts}; {sum(site.counted for site in self.sites)} linears in the budget, {len(self.left)} not adapted",
            "  expected cost per token over dense: "
            f"flops {self.expected_budget('flops'):.3f}, bytes {self.expected_budget('bytes'):.3f}",
        ]
        lines += [f"  note: {text}" for text in self.remarks()]
        for adapter in self.adapters:
            error = "" if adapter.error is None else f", error {adapter.error:.4f}"
            lines.append(f"  {adapter.name}: {adapter.kind}, {adapter.kept:.1f} of {adapter.ranks} kept{details(adapter)}{error}")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write to a folder, atomically: an interrupted or failed save leaves an older plan there intact.

        Raises:
            PlanWriteError.
        """
        from rana_fx.plan_io import write

        write(self, Path(path))


def load_plan(path: str | Path) -> Plan:
    """Read a plan that ``Plan.save`` wrote; no pickle is involved.

    Raises:
        PlanFileError, PlanVersion.
    """
    from rana_fx.plan_io import read

    return read(Path(path))


def adapter_facts(adapter: Adapter) -> dict[str, Any]:
    """An adapter's facts without tensors."""
    facts = {field.name: getattr(adapter, field.name) for field in fields(adapter) if field.name not in TENSORS}
    if adapter.exact_kept is None:
        del facts["exact_kept"]  # so that plans from before there were exact outputs keep their digest
    return {key: list(value) if isinstance(value, tuple) else value for key, value in facts.items()}


def details(adapter: Adapter) -> str:
    """How its matrices are stored, what masks its router and which outputs are exact, for people: ", router 8 bit, ..."."""
    names = {"router": "router", "weight": "factors" if adapter.router is not None else "weights"}
    parts = [f"{names[key]} {bits} bit" for key, bits in adapter.bits().items()]
    if adapter.router_kept is not None:
        parts.insert(1, f"which reads {adapter.router_kept:.1f} of {adapter.width} inputs")
    if adapter.exact_kept is not None:
        parts.append(f"{adapter.exact_kept:.1f} of {adapter.out} outputs exact")
    return "".join(f", {part}" for part in parts)


def tensor_bytes(value: Tensor) -> memoryview:
    """The bytes of a tensor, in row-major order."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def weight_digest(weight: Tensor) -> str:
    """SHA-256 of a weight's bytes, shortened to 16 hex digits."""
    return hashlib.sha256(tensor_bytes(weight)).hexdigest()[:16]
