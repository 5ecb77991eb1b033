"""``rana::masked_gemv_tensor_cores``, ``rana::masked_gemv_parts_tensor_cores``: launches of masked_gemv.cu as operations, which
Inductor calls and CUDA graphs record.

They are what an implementation of ``rana::masked_gemv`` and its fused forms computes with, not operations of a plan: they are
without gradients, and take a launch config.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rana_fx.formats import shape_of
from rana_fx.kernels.cuda.config import Config
from rana_fx.kernels.cuda.masked_gemv import Norm, masked_gemv
from rana_fx.kernels.cuda.masked_gemv_parts import masked_gemv_parts

_SCHEMA = (
    "masked_gemv_tensor_cores(Tensor v, Tensor tau, Tensor weight, Tensor? bias, Tensor? scale, Tensor? residual, "
    "str? activation, Tensor? gain, float? eps, float offset, int[] config, bool early) -> Tensor"
)
_SCHEMA_OF_PARTS = (
    "masked_gemv_parts_tensor_cores(Tensor v, Tensor[] taus, Tensor[] weights, Tensor[] biases, "
    "int[] config, bool early) -> Tensor"
)


def _launch(
    v: Tensor, tau: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None,
    activation: str | None, gain: Tensor | None, eps: float | None, offset: float, config: Sequence[int], early: bool,
) -> Tensor:  # fmt: skip
    norm = None if eps is None else Norm(gain, eps, offset)
    facts: dict[str, Any] = dict(residual=residual, activation=activation, norm=norm, config=Config(*config), early=early)
    return masked_gemv(v, tau, weight, bias, scale, **facts)


def _fake(
    v: Tensor, tau: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None,
    activation: str | None, gain: Tensor | None, eps: float | None, offset: float, config: Sequence[int], early: bool,
) -> Tensor:  # fmt: skip
    columns = shape_of(weight, scale)[1]
    return v.new_empty((*v.shape[:-1], columns // 2 if activation else columns))


def _launch_parts(
    v: Tensor, taus: list[Tensor], weights: list[Tensor], biases: list[Tensor], config: Sequence[int], early: bool
) -> Tensor:
    return masked_gemv_parts(v, taus, weights, biases, config=Config(*config), early=early)


def _fake_parts(
    v: Tensor,
    taus: list[Tensor],  # noqa: ARG001
    weights: list[Tensor],
    biases: list[Tensor],  # noqa: ARG001
    config: Sequence[int],  # noqa: ARG001
    early: bool,  # noqa: ARG001
) -> Tensor:
    return v.new_empty((*v.shape[:-1], sum(weight.shape[1] for weight in weights)))


_LIBRARY = torch.library.Library("rana", "FRAGMENT")
for _schema, _compute, _shape in ((_SCHEMA, _launch, _fake), (_SCHEMA_OF_PARTS, _launch_parts, _fake_parts)):
    _name = _schema.partition("(")[0]
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_name, _compute, "CUDA")
    torch.library.register_fake(f"rana::{_name}", _shape, lib=_LIBRARY)

masked_gemv_tensor_cores = torch.ops.rana.masked_gemv_tensor_cores.default
masked_gemv_parts_tensor_cores = torch.ops.rana.masked_gemv_parts_tensor_cores.default
