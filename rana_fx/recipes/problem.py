"""What a recipe is given: the model's layout, samples of the tensors its linears read, a budget, and a place for notes.

In: the results of calibration and the caller's budget. Out: what every recipe reads of these: dense costs, stacked weights and
rows of any site's input. Adapters are made by ``rana_fx.recipes.builders``.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from rana_fx.budget import Budget
from rana_fx.calibration.holdout import Holdout
from rana_fx.calibration.layout import Layout
from rana_fx.calibration.samples import Reservoir
from rana_fx.errors import TooFewTokens
from rana_fx.progress import Progress
from rana_fx.recipes.memory import Memory
from rana_fx.skips import TOO_FEW, Note, Skip

_T = TypeVar("_T")


@dataclass(eq=False)
class Problem:
    """One adaptation.

    Attributes:
        samples: by the site names of a group, rows of the tensor that the group reads.
        budget: fraction of the dense cost, in ``metric`` ("flops" or "bytes"); both together are ``limit``.
        recipe: its name, for errors. progress: False, or True (or a ``Progress``) to tell of steps; ``steps`` counts them.
        skips: a recipe appends the sites that it leaves dense, each with the reason.
        holdout: the model and some batches, for recipes that simulate their choices; None for recipes that do not.
        asked: the budget of all linears that the caller asked for, where some are left to themselves; ``budget`` is then what
            that leaves for the others, which alone are counted. None: they are the same.
        memory: what problems of other budgets computed; None: there are no others.
    """

    layout: Layout
    samples: Mapping[tuple[str, ...], Reservoir]
    budget: float
    metric: str
    recipe: str
    progress: bool | Progress = True
    skips: list[Skip | Note] = field(default_factory=list)
    holdout: Holdout | None = None
    asked: float | None = None
    memory: Memory | None = None

    @functools.cached_property
    def steps(self) -> Progress:
        """Counts the steps of ``solve``, for whoever follows the whole work."""
        return self.progress if isinstance(self.progress, Progress) else Progress()

    @property
    def limit(self) -> Budget:
        """The budget with its metric."""
        return Budget(self.budget, self.metric)

    def note(self, text: str, site: str = "") -> None:
        """A remark on the whole plan, or on one adapted site; ``plan.notes()`` and ``explain`` report it."""
        self.skips.append(Note(site, text))

    def once(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """``make()``, which does not depend on the budget: where there are several it is kept for the others."""
        return make() if self.memory is None else self.memory.once(key, make)

    @property
    def rehearsal(self) -> Holdout | None:
        """The old name of ``holdout``, for one release."""
        warnings.warn("Problem.rehearsal is named holdout now", DeprecationWarning, stacklevel=2)
        return self.holdout

    # ---- dense costs

    def flops(self, names: tuple[str, ...]) -> float:
        """Dense multiply-adds per token of these sites."""
        return sum(self.layout.sites[name].flops for name in names)

    def bytes(self, names: tuple[str, ...]) -> float:
        """Dense weight bytes per token of these sites."""
        return sum(self.layout.sites[name].flops * self.layout.sites[name].weight.element_size() for name in names)

    def size(self, names: tuple[str, ...]) -> float:
        """Dense cost per token of these sites in the budget's metric."""
        return self.flops(names) if self.metric == "flops" else self.bytes(names)

    def counted(self) -> tuple[str, ...]:
        """Sites that the budget counts."""
        return tuple(site.name for site in self.layout.sites.values() if site.counted)

    # ---- inputs

    def sample(self, name: str) -> Reservoir | None:
        """The sample of the tensor that a site reads; None: an expert that no token reached."""
        return self.samples.get(self.layout.sites_of_group(name))

    def rows(self, name: str) -> Tensor:
        """Sampled rows of the tensor that a site reads, (tokens, in), in the model's dtype."""
        site, sample = self.layout.sites[name], self.sample(name)
        return site.weight.new_empty(0, site.in_features) if sample is None else sample.rows()

    def calibrated(self, names: tuple[str, ...], needed: int) -> bool:
        """Whether the input of these sites was sampled often enough for ``needed`` ranks.

        A pooler, an expert that few tokens reach or a tower that runs in few batches may have one row where the rest of the model
        has a hundred: such sites are left dense, with the reason in ``skips``.

        Raises:
            TooFewTokens: too little text: no layer of the model has more rows.
        """
        seen = len(self.rows(names[0]))
        largest = max((len(sample.rows()) for sample in self.samples.values()), default=0)
        if seen >= needed:
            return True
        if seen >= largest:
            raise TooFewTokens(site=names[0], got=seen, rank=needed, needed=needed)
        reason = f"sees {seen} rows where other layers see {largest}: {TOO_FEW} {needed} ranks, so it stays dense"
        self.skips += [Skip(name, reason) for name in names]
        return False

    # ---- weights

    def matrix(self, names: tuple[str, ...]) -> Tensor:
        """Stacked weights, (sum of out, in), fp32."""
        return torch.cat([self.layout.sites[name].matrix() for name in names])

    def bias(self, names: tuple[str, ...]) -> Tensor | None:
        """Stacked biases, (sum of out,), fp32, or None where none of the sites has one."""
        sites = [self.layout.sites[name] for name in names]
        if all(site.bias is None for site in sites):
            return None
        parts = [site.weight.new_zeros(site.out_features) if site.bias is None else site.bias.detach() for site in sites]
        return torch.cat([part.float() for part in parts])
