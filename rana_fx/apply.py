"""What an adapter computes: the one definition, in terms of rana's operations.

    rank, static     z = router(x, B); y = masked_gemv(z, tau, At, c)                          RaNA Algorithm 3
    with router_tau  z = masked_gemv(x, router_tau, B^T, None)                                  B stored input-major
    neuron, stored   y = masked_gemv(x, tau, Wt, c), or W^T and b of the model                  RaNA section 4, TEAL
    gated            y = masked_gemv(h, 0+, W^T, b), h zero where act(gate)^2 < tau             CATS
    with shift       z - shift (x - shift) instead of z (x)
    with exact_tau   a = (y >= exact_tau).type_as(y); y = where(a != 0, masked_rows(x, a, W, b), y)

``apply`` runs on tensors, which simulates an adapter (rana_fx/recipes/simulate.py), and on the proxies of a graph, which records
the rewrite (passes/rewrite_adapter.py): what is simulated is what is compiled. So it branches only on what tensors and proxies
have in common: the adapter's own tensors, which determine the storage format, and dtypes.

An adapter of several linears multiplies by all their columns at once: q, k, v = y[..., :a], y[..., a:b], y[..., b:]. Where only
some of the linears read x, each multiplies by its own columns of Wt, where the storage format can divide them
(``Format.divisible``); elsewhere the whole product is computed and sliced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rana_fx.adapter import Adapter
from rana_fx.formats import Matrix
from rana_fx.kernels.ops import masked_gemv, masked_rows, router
from rana_fx.kernels.reference import kept

NONZERO = "nonzero"  # among a gated adapter's tensors: ``nonzero_tau``
# The least threshold that drops zeros: the smallest normal number of fp32, 2^-126, since some devices flush smaller ones. Squares
# are taken in fp32, so numbers below 2^-63 count as zeros, too.
NONZERO_TAU = torch.finfo(torch.float32).tiny

# Receives each operation of an adapter: its part, its output and its mask, where it has one. A part is "router" or the name of
# the mask's thresholds: "tau" (ranks, inputs or neurons), "router_tau" (inputs of the router), "exact_tau" (outputs).
Observer = Callable[[str, Tensor, Callable[[], Tensor] | None], None]


@dataclass(frozen=True, eq=False)
class Target:
    """A linear that the adapter replaces, y = x W^T + b, and whose output is needed.

    ``span``: columns of the adapter's outputs that belong to it. ``weight``: W, (out, in), or W^T if ``transposed``; the model's
    own, as ``bias``. ``dtype``: of y, under autocast not the dtype of x; None: not known.
    """

    name: str
    span: tuple[int, int]
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype | None
    transposed: bool = False


def apply(
    adapter: Adapter,
    tensors: Mapping[str, Tensor | None],
    x: Tensor,
    targets: Sequence[Target],
    *,
    gate: Tensor | None = None,
    every_row: bool = False,
    observe: Observer | None = None,
) -> list[Tensor]:
    """What the adapter computes instead of ``targets``, which read x.

    Args:
        adapter: determines the kind, the densities and the formats.
        tensors: values of ``adapter.tensors()`` by name, None or missing where it has none; for kind "gated" also "nonzero"
            (``nonzero_tau``).
        x: (..., in).
        targets: all linears of the adapter, or some, once each.
        gate: of a gated adapter, the mask of its neurons, x's shape; None where x is zero outside of it.
        every_row: compute exact outputs from all rows of the model's weight and select them, as where gradients flow, or where
            tokens are many and together need every row. The values are the same.
        observe: called with each operation.

    Returns:
        (..., out) for each target.
    """
    observe = observe or _ignore
    wanted = targets[0].dtype
    if gate is not None:
        x = torch.where(gate, x, x.new_zeros(()))
    v = _shifted(tensors, cast(x if adapter.router is None else _routed(adapter, tensors, x, wanted, observe), wanted))
    if adapter.weight is None:
        return [_by_models_weight(adapter, tensors, v, target, gate, observe) for target in targets]
    outs = _by_own_weight(adapter, tensors, v, targets, observe)
    if adapter.exact_tau is None:
        return outs
    return [_exact(adapter, tensors, x, y, target, every_row, observe) for y, target in zip(outs, targets, strict=True)]


def gate_mask(a: Tensor, tau: Tensor) -> Tensor:
    """The activated gate a, 0 where a^2 is a number below tau: the mask of a gated adapter."""
    return torch.where(kept(a, tau), a, a.new_zeros(()))


def nonzero_tau(adapter: Adapter, device: torch.device) -> Tensor:
    """Thresholds that drop zeros (``NONZERO_TAU``), (ranks,) fp32: those of a gated adapter's product behind its masked gate."""
    return torch.full((adapter.ranks,), NONZERO_TAU, device=device)


def spans(adapter: Adapter, out_features: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """The columns of the adapter's outputs that belong to each of its sites, which are stacked in its order."""
    found, start = {}, 0
    for site in adapter.sites:
        found[site] = (start, start + out_features[site])
        start += out_features[site]
    return found


def cast(x: Tensor, wanted: torch.dtype | None) -> Tensor:
    """x in a dtype, where both are known and differ: autocast casts what a linear reads, and nothing else."""
    return x.to(wanted) if wanted is not None and x.dtype not in (wanted, None) else x


# ---- v: what is masked


def _routed(
    adapter: Adapter, tensors: Mapping[str, Tensor | None], x: Tensor, wanted: torch.dtype | None, observe: Observer
) -> Tensor:
    """z = B x."""
    rows, scale = _required(tensors, "router"), tensors.get("router_scale")
    if adapter.router_tau is not None:
        x, tau = cast(x, wanted), _required(tensors, "router_tau")
        z: Tensor = masked_gemv(x, tau, rows, None, scale, adapter.router_density)
        observe("router_tau", z, lambda: kept(x, tau))
        return z
    if scale is not None:
        z = router(cast(x, wanted), rows, scale)
    else:
        plain = wanted in (None, x.dtype) and x.dtype == rows.dtype
        # autocast casts what a linear reads, and nothing else
        z = (router if plain else torch.nn.functional.linear)(x, rows)
    observe("router", z, None)
    return z


def _shifted(tensors: Mapping[str, Tensor | None], v: Tensor) -> Tensor:
    shift = tensors.get("shift")
    return v if shift is None else torch.sub(v, cast(shift, v.dtype))


# ---- y: products with what the mask keeps


def _by_models_weight(
    adapter: Adapter,
    tensors: Mapping[str, Tensor | None],
    v: Tensor,
    target: Target,
    gate: Tensor | None,
    observe: Observer,
) -> Tensor:
    """By W^T itself: there is no copy of it, and gradients reach it."""
    weight = target.weight if target.transposed else torch.t(target.weight)
    bias = tensors.get("bias")
    if bias is None:
        bias = target.bias
    elif len(adapter.sites) > 1:
        bias = _narrow(bias, 0, target.span)
    tau = _required(tensors, NONZERO if adapter.kind == "gated" else "tau")
    return _masked(adapter, v, tau, weight, bias, None, observe, gate)


def _by_own_weight(
    adapter: Adapter, tensors: Mapping[str, Tensor | None], v: Tensor, targets: Sequence[Target], observe: Observer
) -> list[Tensor]:
    weight, scale = _required(tensors, "weight"), tensors.get("weight_scale")
    tau, bias = _required(tensors, "tau"), tensors.get("bias")
    if sorted(target.name for target in targets) == sorted(adapter.sites):
        whole = _masked(adapter, v, tau, weight, bias, scale, observe)
        return [whole if len(adapter.sites) == 1 else _columns(whole, target.span) for target in targets]
    assert adapter.weight is not None
    stored = Matrix.of(adapter.weight, adapter.weight_scale)
    made: list[Tensor] = []  # the whole product, computed at most once
    outs = []
    for target in targets:
        if stored.format.divisible(stored, *target.span):
            values, scales = stored.format.spans(stored, *target.span)
            parts = _narrow(weight, 1, values), scale if scales is None or scale is None else _narrow(scale, 1, scales)
            part_bias = None if bias is None else _narrow(bias, 0, target.span)
            outs.append(_masked(adapter, v, tau, parts[0], part_bias, parts[1], observe))
        else:
            made = made or [_masked(adapter, v, tau, weight, bias, scale, observe)]
            outs.append(_columns(made[0], target.span))
    return outs


def _masked(
    adapter: Adapter,
    v: Tensor,
    tau: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    observe: Observer,
    gate: Tensor | None = None,
) -> Tensor:
    y: Tensor = masked_gemv(v, tau, weight, bias, scale, adapter.density)
    observe("tau", y, lambda: kept(v, tau) if gate is None else gate)
    return y


def _exact(
    adapter: Adapter,
    tensors: Mapping[str, Tensor | None],
    x: Tensor,
    y: Tensor,
    target: Target,
    every_row: bool,
    observe: Observer,
) -> Tensor:
    """y with its large elements computed from the model's own weight.

    The mask is a constant in the backward pass. The last selection is by a, and not by the comparison that a was computed from: a
    compiler could fuse that comparison again, on sums that are not rounded yet, and select other elements than those whose rows
    were read.
    """
    tau = _required(tensors, "exact_tau")
    weight = torch.t(target.weight) if target.transposed else target.weight
    # compared in fp32, whatever the dtype of y
    a = torch.ge(y, tau).type_as(y)
    if every_row:
        exact = torch.nn.functional.linear(x, weight, target.bias)
    else:
        exact = masked_rows(cast(x, y.dtype), a, weight, target.bias, adapter.exact_density)
    observe("exact_tau", exact, lambda: a != 0)
    return torch.where(torch.ne(a, 0), exact, y)


def _columns(y: Tensor, span: tuple[int, int]) -> Tensor:
    # consumers may view the result; for one token the copy costs nothing, for many it fuses with the consumer
    return _narrow(y, -1, span).contiguous()


def _narrow(value: Tensor, dim: int, span: tuple[int, int]) -> Tensor:
    return torch.narrow(value, dim, span[0], span[1] - span[0])


def _required(tensors: Mapping[str, Tensor | None], key: str) -> Tensor:
    value = tensors.get(key)
    assert value is not None, key
    return value


def _ignore(part: str, output: Tensor, mask: Callable[[], Tensor] | None) -> None:
    """The observer where none is given."""
