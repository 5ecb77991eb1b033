"""Declares ``rana::masked_gemv``, ``router``, ``masked_rows`` and their fused forms, and computes them in eager mode.

reference.py defines what each computes, fakes.py the shape of its result, autograd.py its gradients, registry.py which
implementation computes it. Weights are floating, int8 or packed 4-bit; scale and dtype decide which (formats.py). ``density`` is
the expected fraction of kept ranks: the cost model reads it, no value depends on it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rana_fx.errors import UnknownChoice
from rana_fx.kernels import autograd, fakes, registry
from rana_fx.kernels.problem import operand_of_tensor, problem_of

_SCHEMAS = {
    "masked_gemv": "Tensor v, Tensor tau, Tensor weight, Tensor? bias=None, Tensor? scale=None, float density=0.5",
    "router": "Tensor x, Tensor weight, Tensor? scale=None",
    # rows of x and of a are the same tokens, in the same order; the result has a's shape
    "masked_rows": "Tensor x, Tensor a, Tensor weight, Tensor? bias=None, float density=0.5",
    # made by passes/fuse*.py in a graph that is past autograd: without a backward
    "masked_gemv_add": "Tensor v, Tensor tau, Tensor weight, Tensor? bias, Tensor? scale, float density, Tensor residual",
    "masked_gemv_gated": "Tensor v, Tensor tau, Tensor weight, Tensor? bias, Tensor? scale, float density, str activation",
    "masked_gemv_normed": (
        "Tensor v, Tensor? gain, Tensor tau, Tensor weight, Tensor? bias, Tensor? scale, float density, str? activation, "
        "float eps, float offset"
    ),
    "masked_gemv_parts": "Tensor v, Tensor[] taus, Tensor[] weights, Tensor[] biases, float density",
    "normed_router": "Tensor x, Tensor? gain, Tensor weight, Tensor? scale=None, float eps=0., float offset=0.",
}
_chosen = ["auto"]


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    """Choose which implementation computes the operations in eager mode, for the whole process, inside a ``with``.

    Args:
        name: "auto": the first row of the registry that applies, which is on a GPU a kernel for up to 4 tokens where the weight
            is floating, since above that its dense matmul is faster (cost.py), and for up to 16 where the reference would first
            have to unpack it. "reference": plain PyTorch. "triton": the kernels for up to 16 tokens of any weight, also
            without a GPU, where Triton must have been imported under its interpreter. Any other: what was registered under that
            name (registry.register_implementation). What an implementation does not accept, the reference computes.

    Raises:
        UnknownChoice.
    """
    known = ("auto", *registry.launchable())
    if name not in known:
        raise UnknownChoice(kind="implementation", got=name, valid=", ".join(known))
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.pop()


def arguments_of(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, in the operation's order, defaults filled in."""
    declared = _parameters(op)
    return declared | dict(zip(declared, args, strict=False)) | dict(kwargs)


@functools.cache
def _parameters(op: str) -> dict[str, Any]:
    """Names of an operation's parameters in order, each with its default (None where it has none)."""
    declared = getattr(torch.ops.rana, op).default._schema.arguments
    return {argument.name: argument.default_value for argument in declared}


def without_density(arguments: Mapping[str, Any]) -> list[Any]:
    """What launchers and lowerings take: ``density`` is in the problem."""
    return [value for name, value in arguments.items() if name != "density"]


def _eager(op: str) -> Callable[..., Tensor]:
    def compute(*args: Any, **kwargs: Any) -> Tensor:
        arguments = arguments_of(op, args, kwargs)
        problem = problem_of(op, arguments, operand_of_tensor, compiled=False)
        chosen = registry.choose(problem, name=None if _chosen[-1] == "auto" else _chosen[-1])
        y: Tensor = chosen.code(compiled=False)(*without_density(arguments))
        return y

    return compute


_LIBRARY = torch.library.Library("rana", "DEF")
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(f"{_name}({_schema}) -> Tensor")
    _LIBRARY.impl(_name, _eager(_name), "CompositeExplicitAutograd")
fakes.register(_LIBRARY)
autograd.register(_LIBRARY)

masked_gemv = torch.ops.rana.masked_gemv.default
masked_gemv_add = torch.ops.rana.masked_gemv_add.default
masked_gemv_parts = torch.ops.rana.masked_gemv_parts.default
masked_gemv_gated = torch.ops.rana.masked_gemv_gated.default
masked_gemv_normed = torch.ops.rana.masked_gemv_normed.default
masked_rows = torch.ops.rana.masked_rows.default
router = torch.ops.rana.router.default
normed_router = torch.ops.rana.normed_router.default
