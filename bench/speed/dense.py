"""A dense model compiled by Inductor with the attention of decoded tokens and the options of Inductor that ``rana_fx.backend``
uses, and nothing else of it.

In: what torch.compile gives to a backend. Out: Inductor's compiled function, after the passes ``rewrite_attention`` and
``fuse_repeated_heads``. So the gain of a plan is not mixed up with that of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from rana_fx.passes import lower
from rana_fx.passes.base import PreGrad
from rana_fx.passes.fuse_repeated_heads import fuse_repeated_heads
from rana_fx.passes.match import match_plan
from rana_fx.passes.rewrite_attention import rewrite_attention
from rana_fx.passes.runner import Result, Runner, run_post_grad
from rana_fx.passes.sources import sources_hash
from rana_fx.runtime.inductor_options import OF_DECODING, inductor_options, launches_wait


def attention_alone(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """A backend for torch.compile. ``options``: "mode", and the options of Inductor."""
    lower.register()
    found = Result(match_plan(gm, example_inputs), Runner())
    found.runner.run((rewrite_attention,), gm, PreGrad(example_inputs, found.matches))
    patches = dict.fromkeys(OF_DECODING, True) if _on_gpu(example_inputs) else {}
    patches |= inductor_options(options, None) | {"post_grad_custom_pre_pass": _RepeatedHeads(found)}
    with launches_wait():
        compiled: Callable[..., Any] = compile_fx(gm, list(example_inputs), config_patches=patches)
    return compiled


def _on_gpu(example_inputs: Sequence[Any]) -> bool:
    return any(isinstance(value, Tensor) and value.is_cuda for value in example_inputs)


class _RepeatedHeads(CustomGraphPass):
    def __init__(self, found: Result) -> None:
        self._found = found

    def __call__(self, graph: fx.Graph) -> None:
        run_post_grad(self._found, graph, passes=(fuse_repeated_heads,))

    def uuid(self) -> Any:
        return sources_hash()
