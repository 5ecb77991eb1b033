"""``rana::masked_gemv_tensor_cores``: the launch of masked_gemv.cu as an operation, which Inductor calls and CUDA graphs record.

It is what an implementation of ``rana::masked_gemv`` and its fused forms computes with, not an operation of a plan: it is without
gradients, and takes a launch config.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rana_fx.formats import shape_of
from rana_fx.kernels.cuda.config import Config
from rana_fx.kernels.cuda.masked_gemv import masked_gemv

_SCHEMA = (
    "masked_gemv_tensor_cores(Tensor v, Tensor tau, Tensor weight, Tensor? bias, Tensor? scale, Tensor? residual, "
    "str? activation, int[] config, bool early) -> Tensor"
)


def _launch(
    v: Tensor, tau: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None,
    activation: str | None, config: Sequence[int], early: bool,
) -> Tensor:  # fmt: skip
    return masked_gemv(v, tau, weight, bias, scale, residual=residual, activation=activation, config=Config(*config), early=early)


def _fake(
    v: Tensor, tau: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None,
    activation: str | None, config: Sequence[int], early: bool,
) -> Tensor:  # fmt: skip
    columns = shape_of(weight, scale)[1]
    return v.new_empty((*v.shape[:-1], columns // 2 if activation else columns))


_LIBRARY = torch.library.Library("rana", "FRAGMENT")
_LIBRARY.define(_SCHEMA)
_LIBRARY.impl("masked_gemv_tensor_cores", _launch, "CUDA")
torch.library.register_fake("rana::masked_gemv_tensor_cores", _fake, lib=_LIBRARY)

masked_gemv_tensor_cores = torch.ops.rana.masked_gemv_tensor_cores.default
