"""Adapters of the three basic kinds, with their costs filled in.

In: a problem, the sites and the parameters chosen for them. Out: rank (or static), neuron and gated adapters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rana_fx.adapter import Adapter
from rana_fx.calibration.layout import MlpBlock
from rana_fx.recipes.basis import Basis, RankThreshold
from rana_fx.recipes.problem import Problem


def rank_adapter(
    problem: Problem, names: tuple[str, ...], basis: Basis, chosen: RankThreshold, *, static: bool = False
) -> Adapter:
    """The first ``chosen.rank`` components of ``basis``, those with z^2 >= ``chosen.threshold``, for stacked sites.

    Factors are in the model's dtype and on the CPU, tau in fp32. ``static``: every component is kept.
    """
    first = problem.layout.sites[names[0]]
    out = sum(problem.layout.sites[name].out_features for name in names)
    rank = chosen.rank
    flops = first.uses * (rank * first.in_features + chosen.kept * out)
    adapter = Adapter(
        name=stack_name(names),
        kind="static" if static else "rank",
        sites=names,
        ranks=rank,
        kept=chosen.kept,
        tau=torch.full((rank,), chosen.threshold, dtype=torch.float32, device="cpu"),
        router=basis.b_DI[:rank],
        weight=basis.a_OD[:, :rank].t(),
        bias=problem.bias(names),
        flops=flops,
        dense_flops=problem.flops(names),
        bytes=flops * first.weight.element_size(),
        dense_bytes=problem.bytes(names),
        error=max(0.0, 1.0 - chosen.coverage),
    )
    # a plan lives on the CPU: attaching it puts the only copy on the model's device
    return adapter.to(first.weight.dtype).on("cpu")


def neuron_adapter(problem: Problem, name: str, squared_threshold: float, norms_I: Tensor, fraction: float) -> Adapter:
    """Keep input j of one site where (x_j norm_j)^2 >= squared_threshold; ``fraction``: of the inputs, kept on average."""
    site = problem.layout.sites[name]
    tau = (squared_threshold / norms_I.double().square()).float()  # a zero column gives inf: its input is never needed
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
        bytes=fraction * problem.bytes((name,)),
        dense_bytes=problem.bytes((name,)),
    )


def gated_adapter(problem: Problem, block: MlpBlock, tau: Tensor, kept: float, bias: Tensor | None = None) -> Adapter:
    """Keep neuron j, its row of up and its column of down, where act(gate)_j^2 >= tau_j (CATS, COLM 2024).

    Args:
        tau: (neurons,), or one threshold for all, (1,); fp32.
        kept: neurons per token on average. bias: of down, in place of its own.
    """
    gate, up = block.ups[block.gate], block.ups[1 - block.gate]
    masked = (block.down, up)
    made = Adapter(
        name=block.down,
        kind="gated",
        sites=(block.down,),
        ranks=problem.layout.sites[block.down].in_features,
        kept=kept,
        tau=tau,
        bias=bias,
        dense_flops=problem.flops(masked),
        dense_bytes=problem.bytes(masked),
        gate=gate,
        also=(up,),
    )
    return made.costed()


def stack_name(names: tuple[str, ...]) -> str:
    """``a.q_proj``, ``a.k_proj`` -> ``a.q_proj+k_proj``."""
    head, *rest = names
    prefix = head.rpartition(".")[0]
    return "+".join([head, *(name.removeprefix(prefix + ".") if prefix else name for name in rest)])
