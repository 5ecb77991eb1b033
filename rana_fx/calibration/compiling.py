"""Whether torch.compile is enabled in this process: without it no model can be traced or adapted.

In: the switches of TorchDynamo. Out: an error that names the one that is off, or a context in which functions are compiled by the
backend that they are given.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from rana_fx.errors import CompilationDisabled

_VARIABLE = "TORCHDYNAMO_DISABLE"


def check_compiling() -> None:
    """Raises CompilationDisabled where a switch of PyTorch turns torch.compile off."""
    import torch._dynamo

    if os.environ.get(_VARIABLE, "") == "1":
        raise CompilationDisabled(reason=f"the environment variable {_VARIABLE} is 1", todo="Unset it and start Python again")
    if torch._dynamo.config.disable:
        raise CompilationDisabled(reason="torch._dynamo.config.disable is True", todo="Set torch._dynamo.config.disable = False")
    if _stance().stance == "force_eager":
        raise CompilationDisabled(
            reason='torch.compiler.set_stance("force_eager") is in effect',
            todo='Call torch.compiler.set_stance("default"), or leave the context that set it',
        )


def check_backend_is_called() -> None:
    """For a model whose run produced no graph. Raises CompilationDisabled where no function would produce one."""
    seen: list[object] = []

    def backend(graph_module: torch.fx.GraphModule, _: object) -> object:
        seen.append(graph_module)
        return graph_module.forward

    with torch.no_grad():
        torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(2, device="cpu"))
    if not seen:
        raise CompilationDisabled(
            reason="it runs functions as they are here, as inside of a TorchDispatchMode or while another tracer runs",
            todo="Leave the context around this call",
        )


def own_backends() -> AbstractContextManager[object]:
    """Inside, compiled functions are traced on their first call by their own backend, independently of the stance set outside."""
    stance = _stance()
    plain = stance.stance == "default" and stance.backend is None
    return nullcontext() if plain else torch.compiler.set_stance("default")


def _stance() -> torch._dynamo.eval_frame.DynamoStance:
    import torch._dynamo.eval_frame

    return torch._dynamo.eval_frame._stance
