"""``rana::router_tensor_cores``: the launch of router.cu as an operation, which Inductor calls and CUDA graphs record.

It is what an implementation of ``rana::router`` and ``rana::normed_router`` computes with, not an operation of a plan: it is
without gradients, and takes a launch config. ``eps`` None: without a norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rana_fx.kernels.cuda.router import router
from rana_fx.kernels.cuda.router_config import RouterConfig

_SCHEMA = (
    "router_tensor_cores(Tensor x, Tensor? gain, Tensor weight, Tensor? scale, float? eps, float offset, "
    "int[] config, bool early) -> Tensor"
)


def _launch(
    x: Tensor, gain: Tensor | None, weight: Tensor, scale: Tensor | None, eps: float | None, offset: float,
    config: Sequence[int], early: bool,
) -> Tensor:  # fmt: skip
    return router(x, weight, scale, gain=gain, eps=eps, offset=offset, config=RouterConfig(*config), early=early)


def _fake(
    x: Tensor,
    gain: Tensor | None,  # noqa: ARG001
    weight: Tensor,
    scale: Tensor | None,  # noqa: ARG001
    eps: float | None,  # noqa: ARG001
    offset: float,  # noqa: ARG001
    config: Sequence[int],  # noqa: ARG001
    early: bool,  # noqa: ARG001
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_LIBRARY = torch.library.Library("rana", "FRAGMENT")
_LIBRARY.define(_SCHEMA)
_LIBRARY.impl("router_tensor_cores", _launch, "CUDA")
torch.library.register_fake("rana::router_tensor_cores", _fake, lib=_LIBRARY)

router_tensor_cores = torch.ops.rana.router_tensor_cores.default
