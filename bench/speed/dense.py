"""A dense model compiled by Inductor with the attention of decoded tokens that ``rana_fx.backend`` uses, and nothing else of it.

In: what torch.compile gives to a backend. Out: Inductor's compiled function, after the passes ``rewrite_attention`` and
``fuse_repeated_heads``. So the gain of a plan is not mixed up with that of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from rana_fx.passes import lower
from rana_fx.passes.base import PostGrad, PreGrad
from rana_fx.passes.fuse_repeated_heads import fuse_repeated_heads
from rana_fx.passes.match import match_plan
from rana_fx.passes.rewrite_attention import rewrite_attention
from rana_fx.passes.runner import Runner
from rana_fx.passes.sources import sources_hash
from rana_fx.runtime.inductor_options import inductor_options


def attention_alone(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """A backend for torch.compile. ``options``: "mode", and the options of Inductor."""
    lower.register()
    runner = Runner()
    runner.run((rewrite_attention,), gm, PreGrad(example_inputs, match_plan(gm, example_inputs)))
    patches = inductor_options(options, None) | {"post_grad_custom_pre_pass": _RepeatedHeads(runner)}
    compiled: Callable[..., Any] = compile_fx(gm, list(example_inputs), config_patches=patches)
    return compiled


class _RepeatedHeads(CustomGraphPass):
    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def __call__(self, graph: fx.Graph) -> None:
        module = graph.owning_module
        assert module is not None, "Inductor runs passes on the graphs of modules"
        self._runner.run((fuse_repeated_heads,), module, PostGrad(), past_autograd=True)

    def uuid(self) -> Any:
        return sources_hash()
