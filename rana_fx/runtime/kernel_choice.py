"""Which implementation multiplies by the rows that a mask keeps, and why faster ones do not, for ``explain``.

In: an adapter, the linears it replaces, a device. Out: a ``KernelChoice``, as Inductor's lowerings choose for one token, on a GPU
under CUDA graphs (mode "reduce-overhead").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rana_fx.adapter import Adapter
from rana_fx.kernels.problem import Problem
from rana_fx.kernels.registry import REFERENCE, choose, why
from rana_fx.plan import SiteRecord
from rana_fx.runtime.adapter_time import problems

_TENSOR_CORES = "tensor_cores"  # the fastest of a GPU


@dataclass(frozen=True)
class KernelChoice:
    """name: of the implementation. slower: why the device's fastest kernel is not used; empty where it is."""

    name: str
    slower: str = ""


def kernel_choice(adapter: Adapter, sites: Mapping[str, SiteRecord], device: torch.device) -> KernelChoice:
    """Of the adapter's masked matmul. ``sites``: the linears that it replaces, and ``adapter.also``; more may be given."""
    from torch._inductor import config

    product = problems(adapter, sites, device, 1, False)[-1 if adapter.exact_tau is None else -2]
    with config.patch({"triton.cudagraphs": device.type == "cuda"}):
        chosen = choose(product).name
        passed = {row.name: reason for row, reason in why(product)}
    if chosen == REFERENCE or device.type not in ("cuda", "cpu"):
        return KernelChoice(chosen)  # a dense matmul, or a device without kernels to compare
    if device.type == "cpu":
        return KernelChoice(chosen, _without_integers(product))
    return KernelChoice(chosen, f"{_TENSOR_CORES}: {passed[_TENSOR_CORES]}" if _TENSOR_CORES in passed else "")


def _without_integers(product: Problem) -> str:
    """Why weights in 8 and 4 bits are multiplied as floating-point numbers on a CPU."""
    from rana_fx.kernels.cpp.integers import facts

    if not product.quantized or facts(product.dtype)["dot"] is not None:
        return ""
    return "integer products: Inductor's instruction set has neither AVX-512 VNNI nor AVX2"
