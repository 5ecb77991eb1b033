"""``with rana_fx.disabled():`` the dense model, compiled, in place of the adapted one.

In: a ``with`` block around calls of compiled models. Out: the same calls by the dense weights: Dynamo is told to compile with
Inductor alone. Code that was compiled for the plan is kept, and runs again after the block without being compiled again; so is
the dense code, for the next block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from rana_fx.dense_memory import is_freed
from rana_fx.errors import WeightsFreed
from rana_fx.runtime.attachment import attachment_of


@contextmanager
def disabled() -> Iterator[None]:
    """Inside, every compiled model runs dense, compiled by Inductor; no plan is detached, nothing that was compiled is lost.

    For comparisons in place. The first call inside compiles the dense model. All that torch.compile runs in the process is
    concerned, in every thread, until the block ends. Options and modes that a model was compiled with do not apply inside.

    Raises:
        WeightsFreed: on the first call inside, where the model was compiled with ``prefill="factors"``. (torch.compile wraps it
            in BackendCompilerFailed, whose ``inner_exception`` it is.)

    Example:
        >>> fast = torch.compile(model, backend=rana_fx.backend)
        >>> adapted = fast(**batch).logits
        >>> with rana_fx.disabled():
        ...     dense = fast(**batch).logits
    """
    with torch.compiler.set_stance("default", force_backend=_dense):
        yield


def _dense(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """The backend inside: Inductor, for graphs whose weights are all there. Raises WeightsFreed."""
    from torch._inductor.compile_fx import compile_fx

    for value in example_inputs:
        if isinstance(value, nn.Parameter) and is_freed(value):
            attachment = attachment_of(value)
            site = "a weight" if attachment is None else attachment.names.get(id(value), "a weight")
            raise WeightsFreed(site=site, what="run it dense")
    compiled: Any = compile_fx(gm, list(example_inputs))
    return compiled  # type: ignore[no-any-return]
