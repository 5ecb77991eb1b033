"""Options of Inductor: from those of torch.compile, and the defaults of graphs that decode on a GPU.

A decoded token is some hundred kernels of a few microseconds, of which a launch is one or two. So graphs with adapters of at most
MAX_TOKENS tokens are compiled with

    combo_kernels        independent pointwise kernels become one (rotary embeddings of q and k, the update of the cache)
    triton.enable_pdl    kernels start before the previous one is done, and wait for it before they read what it wrote
                         (programmatic dependent launch, compute capability 9.0)

which Inductor leaves off.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx

from rana_fx.errors import InvalidOption
from rana_fx.graph.dataflow import value_of
from rana_fx.kernels.registry import OPERATIONS
from rana_fx.kernels.triton.config import MAX_TOKENS

_KNOWN_OPTIONS = "'plan', 'prefill', 'strict', 'mode' or an option of Inductor (torch._inductor.list_options())"
OF_DECODING = ("combo_kernels", "triton.enable_pdl")
_EARLY, _NOT_EARLY = "'launch_pdl': True", "'launch_pdl': False"
_WAIT = "gdc_wait()"


def inductor_options(options: Mapping[str, Any] | None, mode: str | None) -> dict[str, Any]:
    """Inductor's config patches for a mode and options of torch.compile. Raises InvalidOption."""
    from torch._inductor import list_mode_options

    given = dict(options or {})
    mode = given.pop("mode", mode) or "default"
    known = list_mode_options()
    if mode not in known:
        raise InvalidOption(name="mode", got=mode, expected=f"one of {', '.join(known)}")
    patches: dict[str, Any] = dict(known[mode])
    settings = torch._inductor.config.get_config_copy()
    for name, value in given.items():
        key = name.replace("-", "_")
        if key not in settings:
            raise InvalidOption(name=name, got=value, expected=_KNOWN_OPTIONS)
        patches[key] = value
    return patches


def with_defaults(patches: Mapping[str, Any], graph_module: fx.GraphModule) -> dict[str, Any]:
    """Config patches, and the defaults of a rewritten graph that decodes: some adapter computes few tokens on a GPU, without
    gradients, in code that is called from Python. What the patches hold stays.
    """
    if torch.is_grad_enabled() or not any(_decodes(node) for node in graph_module.graph.nodes):
        return dict(patches)
    settings = torch._inductor.config.get_config_copy() | dict(patches)
    if settings["cpp_wrapper"]:
        return dict(patches)
    return {name: True for name in OF_DECODING if name in settings} | dict(patches)


def _decodes(node: fx.Node) -> bool:
    """Whether it is an operation of an adapter, of few tokens on a GPU."""
    y = value_of(node)
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(y, Tensor) or y.device.type != "cuda":
        return False
    ours = node.target.namespace == "rana" and node.target._schema.name.partition("::")[2] in OPERATIONS
    lead = y.shape[:-1]
    return ours and all(isinstance(size, int) for size in lead) and lead.numel() <= MAX_TOKENS


@contextlib.contextmanager
def launches_wait() -> Iterator[None]:
    """Inside, kernels that Inductor generates start early only if they wait for the kernel before them.

    With triton.enable_pdl every kernel starts early, also one that reads nothing (a fill) and so never waits. It can end before
    the kernel before it; the kernel after it waits for it alone, and could read what the other has not yet written.
    """
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen

    define = PythonWrapperCodegen.define_kernel
    with patch.object(PythonWrapperCodegen, "define_kernel", _waiting(define)):
        yield


def _waiting(define: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(define)
    def defined(wrapper: Any, name: str, body: str, *args: Any, **kwargs: Any) -> Any:
        if _WAIT not in body:
            body = body.replace(_EARLY, _NOT_EARLY)
        return define(wrapper, name, body, *args, **kwargs)

    return defined
