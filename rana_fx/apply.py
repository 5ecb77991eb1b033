"""What an adapter computes: the one definition, in terms of rana's operations.

    rank, static     z = router(x, B); y = masked_gemv(z, tau, At, c)                          RaNA Algorithm 3
    with router_tau  z = masked_gemv(x, router_tau, B^T, None)                                  B stored input-major
    neuron, stored   y = masked_gemv(x, tau, Wt, c), or W^T and b of the model                  RaNA section 4, TEAL
    gated            y = masked_gemv(h, 0+, W^T, b), h zero where act(gate)^2 < tau             CATS
    with shift       z - shift (x - shift) in the place of z (x)
    with exact_tau   a = (y >= exact_tau).type_as(y); y = where(a != 0, masked_rows(x, a, W, b), y)

``apply`` runs on tensors, which simulates an adapter (rana_fx/recipes/simulate.py), and on the proxies of a graph, which records
the rewrite (passes/rewrite_adapter.py): what is simulated is what is compiled. So it decides by what both know alike: the
adapter's own tensors, which show how numbers are stored, and dtypes.

An adapter of several linears multiplies by all their columns at once: q, k, v = y[..., :a], y[..., a:b], y[..., b:]. Where only
some of the linears read x, each multiplies by its own columns of Wt, where the storage format can divide them
(``Format.divisible``); elsewhere the whole product is made and cut.
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
_TINY = torch.finfo(torch.float32).tiny

# Receives each operation of an adapter: its part, its output and the mask it works by, where it has one. Parts are "router" and,
# after the thresholds of the mask, "tau" (ranks, inputs or neurons), "router_tau" (inputs of the router), "exact_tau" (outputs).
Observer = Callable[[str, Tensor, Callable[[], Tensor] | None], None]


@dataclass(frozen=True, eq=False)
class Target:
    """A linear that the adapter stands for, y = x W^T + b, where its output is wanted.

    ``span``: columns of the adapter's outputs that belong to it. ``weight``: W, (out, in), or W^T if ``transposed``; the model's
    own, as ``bias``. ``dtype``: what y has, under autocast not the dtype of x; None: not known.
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
    """What the adapter computes in the place of ``targets``, which read x.

    Args:
        adapter: for its kind, densities and formats.
        tensors: values of its ``tensors()`` by name, None or missing where it has none; "nonzero" for one of kind "gated".
        x: (..., in).
        targets: all linears of the adapter, or some, once each.
        gate: of a gated adapter, the mask of its neurons, x's shape; None where x is zero outside of it.
        every_row: compute exact outputs from all rows of the model's weight and select them, as where gradients flow, or where
            tokens are many and need every row between them. The same values.
        observe: called with each operation.

    Returns:
        (..., out) for each target.
    """
    see = observe or _ignore
    wanted = targets[0].dtype
    if gate is not None:
        x = torch.where(gate, x, x.new_zeros(()))
    v = _shifted(tensors, cast(x if adapter.router is None else _routed(adapter, tensors, x, wanted, see), wanted))
    if adapter.weight is None:
        return [_by_models_weight(adapter, tensors, v, target, gate, see) for target in targets]
    outs = _by_own_weight(adapter, tensors, v, targets, see)
    if adapter.exact_tau is None:
        return outs
    return [_exact(adapter, tensors, x, y, target, every_row, see) for y, target in zip(outs, targets, strict=True)]


def gate_mask(a: Tensor, tau: Tensor) -> Tensor:
    """The activated gate a, 0 where a^2 is a number below tau: what a gated adapter leaves of it."""
    return torch.where(kept(a, tau), a, a.new_zeros(()))


def nonzero_tau(adapter: Adapter, device: torch.device) -> Tensor:
    """Thresholds that drop exactly the zeros, (ranks,) fp32: those of a gated adapter's product behind its masked gate."""
    return torch.full((adapter.ranks,), _TINY, device=device)


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
    adapter: Adapter, tensors: Mapping[str, Tensor | None], x: Tensor, wanted: torch.dtype | None, see: Observer
) -> Tensor:
    """z = B x."""
    rows, scale = _given(tensors, "router"), tensors.get("router_scale")
    if adapter.router_tau is not None:
        x, tau = cast(x, wanted), _given(tensors, "router_tau")
        z: Tensor = masked_gemv(x, tau, rows, None, scale, adapter.router_density)
        see("router_tau", z, lambda: kept(x, tau))
        return z
    if scale is not None:
        z = router(cast(x, wanted), rows, scale)
    else:
        plain = wanted in (None, x.dtype) and x.dtype == rows.dtype
        # autocast casts what a linear reads, and nothing else
        z = (router if plain else torch.nn.functional.linear)(x, rows)
    see("router", z, None)
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
    see: Observer,
) -> Tensor:
    """By W^T itself: there is no copy of it, and gradients reach it."""
    weight = target.weight if target.transposed else torch.t(target.weight)
    bias = tensors.get("bias")
    if bias is None:
        bias = target.bias
    elif len(adapter.sites) > 1:
        bias = _narrow(bias, 0, target.span)
    tau = _given(tensors, NONZERO if adapter.kind == "gated" else "tau")
    return _masked(adapter, v, tau, weight, bias, None, see, gate)


def _by_own_weight(
    adapter: Adapter, tensors: Mapping[str, Tensor | None], v: Tensor, targets: Sequence[Target], see: Observer
) -> list[Tensor]:
    weight, scale = _given(tensors, "weight"), tensors.get("weight_scale")
    tau, bias = _given(tensors, "tau"), tensors.get("bias")
    if sorted(target.name for target in targets) == sorted(adapter.sites):
        whole = _masked(adapter, v, tau, weight, bias, scale, see)
        return [whole if len(adapter.sites) == 1 else _columns(whole, target.span) for target in targets]
    assert adapter.weight is not None
    stored = Matrix.of(adapter.weight, adapter.weight_scale)
    made: list[Tensor] = []  # the product whole, once it is needed
    outs = []
    for target in targets:
        if stored.format.divisible(stored, *target.span):
            values, scales = stored.format.spans(stored, *target.span)
            parts = _narrow(weight, 1, values), scale if scales is None or scale is None else _narrow(scale, 1, scales)
            part_bias = None if bias is None else _narrow(bias, 0, target.span)
            outs.append(_masked(adapter, v, tau, parts[0], part_bias, parts[1], see))
        else:
            made = made or [_masked(adapter, v, tau, weight, bias, scale, see)]
            outs.append(_columns(made[0], target.span))
    return outs


def _masked(
    adapter: Adapter,
    v: Tensor,
    tau: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    see: Observer,
    gate: Tensor | None = None,
) -> Tensor:
    y: Tensor = masked_gemv(v, tau, weight, bias, scale, adapter.density)
    see("tau", y, lambda: kept(v, tau) if gate is None else gate)
    return y


def _exact(
    adapter: Adapter,
    tensors: Mapping[str, Tensor | None],
    x: Tensor,
    y: Tensor,
    target: Target,
    every_row: bool,
    see: Observer,
) -> Tensor:
    """y with its large elements computed from the model's own weight.

    The mask is a constant in the backward pass. The last selection is by a, and not by the comparison that a was made of: a
    compiler that fused the comparison anew, on sums not yet rounded, could decide otherwise than for the rows that were read.
    """
    tau = _given(tensors, "exact_tau")
    weight = torch.t(target.weight) if target.transposed else target.weight
    # compared in fp32, whatever the dtype of y
    a = torch.ge(y, tau).type_as(y)
    if every_row:
        exact = torch.nn.functional.linear(x, weight, target.bias)
    else:
        exact = masked_rows(cast(x, y.dtype), a, weight, target.bias, adapter.exact_density)
    see("exact_tau", exact, lambda: a != 0)
    return torch.where(torch.ne(a, 0), exact, y)


def _columns(y: Tensor, span: tuple[int, int]) -> Tensor:
    # what follows may view it; at one token this costs nothing, at many it fuses with the consumer
    return _narrow(y, -1, span).contiguous()


def _narrow(value: Tensor, dim: int, span: tuple[int, int]) -> Tensor:
    return torch.narrow(value, dim, span[0], span[1] - span[0])


def _given(tensors: Mapping[str, Tensor | None], key: str) -> Tensor:
    value = tensors.get(key)
    assert value is not None, key
    return value


def _ignore(part: str, output: Tensor, mask: Callable[[], Tensor] | None) -> None:
    """Observes nothing."""
