"""What a recipe is given, and the adapters it may build.

In: the layout of the model, samples of the tensors its groups read, the budget and its metric. Out: the pieces every
recipe shares: sizes, stacked weights, rows of any site's input, and adapters with their costs filled in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rana_fx.adapter import Adapter
from rana_fx.calibration.layout import Layout, MlpBlock
from rana_fx.calibration.probe import Rehearsal
from rana_fx.calibration.samples import Reservoir
from rana_fx.errors import BudgetUnreachable, TooFewTokens
from rana_fx.recipes.paper.line_search import Basis, Choice
from rana_fx.skips import Note, Skip

_SELDOM = 8  # a layer that sees less than an eighth of what others see is used in another way than per token


@dataclass(eq=False)
class Problem:
    """One adaptation. ``skips`` collects what a recipe leaves dense, and why, and its notes."""

    layout: Layout
    samples: Mapping[tuple[str, ...], Reservoir]
    budget: float
    metric: str
    recipe: str
    progress: bool = True
    skips: list[Skip | Note] = field(default_factory=list)
    within: Callable[[str], AbstractContextManager[object]] = nullcontext  # what each stage of a recipe, by its name, runs in
    rehearsal: Rehearsal | None = None  # the model and some batches, for recipes that try what they choose

    def note(self, text: str, site: str = "") -> None:
        """Something a user should know of the whole plan, or of an adapted site: ``explain`` says it."""
        self.skips.append(Note(site, text))

    # ---- sizes

    def flops(self, names: tuple[str, ...]) -> float:
        """Dense multiply-adds per token of these sites."""
        return sum(self.layout.sites[name].flops for name in names)

    def bytes(self, names: tuple[str, ...]) -> float:
        """Dense weight bytes per token of these sites."""
        return sum(self.layout.sites[name].flops * self.layout.sites[name].weight.element_size() for name in names)

    def size(self, names: tuple[str, ...]) -> float:
        """Dense cost of these sites in the budget's metric."""
        return self.flops(names) if self.metric == "flops" else self.bytes(names)

    def counted(self) -> tuple[str, ...]:
        """Sites the budget counts."""
        return tuple(site.name for site in self.layout.sites.values() if site.counted)

    def fraction(self, adaptable: tuple[str, ...], *, lowest_share: float = 0.0, why: str = "") -> float:
        """What ``adaptable`` sites may cost, as a fraction of their dense cost, when all other sites stay dense."""
        total = self.size(self.counted())
        part = self.size(adaptable)
        dense = total - part
        lowest = (dense + lowest_share * part) / total
        if part == 0 or self.budget * total - dense <= lowest_share * part:
            raise BudgetUnreachable(
                budget=self.budget,
                recipe=self.recipe,
                lowest=min(1.0, lowest + 0.01),
                why=why or f"{dense / total:.1%} of the cost is in layers this recipe leaves dense",
                recipes="static, teal and wina adapt every layer",
            )
        return (self.budget * total - dense) / part

    # ---- tensors

    def sample(self, name: str) -> Reservoir | None:
        """What was kept of the tensor a site reads; None: an expert that no token reached."""
        return self.samples.get(self.layout.groups[self.layout.sites[name].group].sites)

    def rows(self, name: str) -> Tensor:
        """Sampled rows of the tensor a site reads, (tokens, in), in the model's dtype."""
        site, sample = self.layout.sites[name], self.sample(name)
        return site.weight.new_empty(0, site.in_features) if sample is None else sample.rows()

    def calibrated(self, names: tuple[str, ...], needed: int) -> bool:
        """Whether the input of these sites was seen often enough for ``needed`` ranks.

        A pooler, or an expert that few tokens reach, may see one row where the rest of the model sees a hundred: it is left dense
        and said so. Where the model as a whole saw too little text, TooFewTokens is raised.
        """
        seen = len(self.rows(names[0]))
        most = max((len(sample.rows()) for sample in self.samples.values()), default=0)
        if seen >= needed:
            return True
        if seen * _SELDOM > most:
            raise TooFewTokens(site=names[0], got=seen, rank=needed, needed=needed)
        reason = f"sees {seen} rows where other layers see {most}: too few for {needed} ranks, so it stays dense"
        self.skips += [Skip(name, reason) for name in names]
        return False

    def matrix(self, names: tuple[str, ...]) -> Tensor:
        """Stacked weights, (sum of out, in), fp32."""
        return torch.cat([self.layout.sites[name].matrix() for name in names])

    def bias(self, names: tuple[str, ...]) -> Tensor | None:
        """Stacked biases, fp32, or None when none of the sites has one."""
        sites = [self.layout.sites[name] for name in names]
        if all(site.bias is None for site in sites):
            return None
        parts = [site.weight.new_zeros(site.out_features) if site.bias is None else site.bias.detach() for site in sites]
        return torch.cat([part.float() for part in parts])

    def ups(self, block: MlpBlock, rows_TI: Tensor) -> list[Tensor]:
        """The dense model's outputs of ``block.ups`` for given rows of the block's input, fp32."""
        return [torch.nn.functional.linear(rows_TI.float(), self.matrix((up,)), self.bias((up,))) for up in block.ups]

    def dense_rows(self, block: MlpBlock, rows_TI: Tensor) -> Tensor:
        """The dense model's input of ``block.down`` for given rows of the block's input, fp32."""
        return block.pointwise(*self.ups(block, rows_TI)).float()

    # ---- adapters

    def rank_adapter(self, names: tuple[str, ...], basis: Basis, choice: Choice, *, static: bool = False) -> Adapter:
        first = self.layout.sites[names[0]]
        out = sum(self.layout.sites[name].out_features for name in names)
        rank = choice.rank
        flops = first.uses * (rank * first.in_features + choice.kept * out)
        adapter = Adapter(
            name=stack_name(names),
            kind="static" if static else "rank",
            sites=names,
            ranks=rank,
            kept=choice.kept,
            tau=torch.full((rank,), choice.threshold, dtype=torch.float32),
            router=basis.b_DI[:rank],
            weight=basis.a_OD[:, :rank].t(),
            bias=self.bias(names),
            flops=flops,
            dense_flops=self.flops(names),
            bytes=flops * first.weight.element_size(),
            dense_bytes=self.bytes(names),
            error=max(0.0, 1.0 - choice.coverage),
        )
        # a plan lives on the CPU: attaching it puts the only copy on the model's device
        return adapter.to(first.weight.dtype).on("cpu")

    def neuron_adapter(self, name: str, squared_threshold: float, norms_I: Tensor, fraction: float) -> Adapter:
        """Keep input j where (x_j norm_j)^2 >= squared_threshold."""
        site = self.layout.sites[name]
        tau = (squared_threshold / norms_I.double().square()).float()  # a zero column gives inf: it is never needed
        if squared_threshold == 0:
            tau = torch.zeros_like(tau)
        tau = tau.cpu()
        return Adapter(
            name=name,
            kind="neuron",
            sites=(name,),
            ranks=site.in_features,
            kept=fraction * site.in_features,
            tau=tau,
            flops=fraction * site.flops,
            dense_flops=site.flops,
            bytes=fraction * self.bytes((name,)),
            dense_bytes=self.bytes((name,)),
        )

    def gated_adapter(self, block: MlpBlock, tau: Tensor, kept: float, bias: Tensor | None = None) -> Adapter:
        """Keep neuron j, its row of up and its column of down, where act(gate)_j^2 >= tau_j, one threshold or one for each."""
        gate, up = block.ups[block.gate], block.ups[1 - block.gate]
        masked = (block.down, up)
        made = Adapter(
            name=block.down,
            kind="gated",
            sites=(block.down,),
            ranks=self.layout.sites[block.down].in_features,
            kept=kept,
            tau=tau,
            bias=bias,
            dense_flops=self.flops(masked),
            dense_bytes=self.bytes(masked),
            gate=gate,
            also=(up,),
        )
        return made.costed()


def stack_name(names: tuple[str, ...]) -> str:
    """``a.q_proj``, ``a.k_proj`` -> ``a.q_proj+k_proj``."""
    head, *rest = names
    prefix = head.rpartition(".")[0]
    return "+".join([head, *(name.removeprefix(prefix + ".") if prefix else name for name in rest)])
