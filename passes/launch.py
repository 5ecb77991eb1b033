"""A kernel launch as nodes that Inductor lowers, and launches that start before the previous kernel is done.

In: a launcher of ``rana_fx.kernels`` and Inductor IR of its operands. Out: IR of its result. The launcher is traced on fake
tensors with the operands' sizes and strides, which records its launch and its buffers in a small graph; Inductor lowers that
graph, writes the kernel into its own module and autotunes nothing around it.

Programmatic dependent launch (PDL) is an option of Triton's compiler that Inductor passes on from ``triton_meta``, which Inductor
generates for a user's kernel (torch 2.11, 2.13): the option is added to the generated text, for kernels with PDL=True.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor import ir
from torch._inductor.lowering import lowerings, process_subgraph_nodes
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx

from rana_fx.kernels.triton.config import COUNTERS
from rana_fx.passes.ir_nodes import boxed


def traced(launch: Callable[..., Any], operands: Sequence[Any], *, key: Hashable) -> Any:
    """Lower what ``launch`` does to the operands (an operand may be None).

    key: all that the launch depends on besides the operands' sizes, strides and dtypes. Layers with equal keys are traced once.
    """
    fakes = [fake(node) for node in operands]
    given = [i for i, node in enumerate(operands) if node is not None]
    graphs = _of_this_graph("traced")
    full_key = (key, *(None if one is None else _layout_of(one) for one in fakes))
    if full_key not in graphs:
        graphs[full_key] = _graph_of(launch, given, fakes)
    before = len(V.graph.operations)
    with _mutations_without_pdl():
        result = process_subgraph_nodes(graphs[full_key], [operands[i] for i in given])
    for node in graphs[full_key].graph.nodes:
        V.graph.env.pop(node, None)  # the same nodes are lowered again for the next layer
    for operation in V.graph.operations[before:]:
        if isinstance(operation, ir.UserDefinedTritonKernel) and operation.kwargs.get("PDL"):
            vars(operation)["codegen"] = functools.partial(_codegen_with_pdl, operation)
    return result


def _graph_of(launch: Callable[..., Any], given: list[int], fakes: list[torch.Tensor | None]) -> torch.fx.GraphModule:
    """The graph of a launch, traced on fake tensors."""

    def run(*tensors: Any) -> Any:
        values: list[Any] = [None] * len(fakes)
        for i, tensor in zip(given, tensors, strict=True):
            values[i] = tensor
        return launch(*values)

    with V.fake_mode:  # the launcher's own buffers are fake, too
        graph: torch.fx.GraphModule = make_fx(run)(*(fakes[i] for i in given))
    return graph


def realized(*nodes: Any) -> list[Any]:
    """Operands realized with fixed strides: views of weights as they are, computed values contiguous."""
    made = []
    for node in nodes:
        if node is not None:
            node = ir.ExternKernel.realize_input(node)
            if not isinstance(node, ir.ReinterpretView):
                node = ir.ExternKernel.require_contiguous(node)
            node = boxed(node)
        made.append(node)
    return made


def fake(node: Any) -> torch.Tensor | None:
    """A fake tensor with a node's sizes and strides, and the same storage offset modulo 16 elements."""
    if node is None:
        return None
    size, stride = ([int(n) for n in many] for many in (node.get_size(), node.get_stride()))
    offset = int(node.get_layout().offset) % 16
    length = 1 + offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    with V.fake_mode:
        memory = torch.empty(max(length, 0), dtype=node.get_dtype(), device=node.get_device())
        return memory.as_strided(size, stride, offset)


def counters(device: torch.device) -> Any:
    """(COUNTERS,) int32 zeros, shared by the launches of a graph, which run one after another: one fill per call."""
    cached = _of_this_graph("counters")
    if device not in cached:
        made = lowerings[torch.ops.aten.full.default]([COUNTERS], 0, dtype=torch.int32, device=device, pin_memory=False)
        made.realize()
        cached[device] = made
    return cached[device]


def starts_early(x: Any, constants: Sequence[Any]) -> bool:
    """Whether a launch may begin while the kernel before it runs: it reads ``constants`` before it waits for that kernel.

    So ``constants`` must be inputs of the graph that no kernel of the graph writes or copies. x, which is read after the wait,
    must not be an input: then a kernel of this graph ran before this one, and all kernels before the graph are done. False in
    training, where an optimizer writes weights.
    """
    if not V.graph.is_inference or torch.cuda.get_device_capability(x.get_device())[0] < 9 or _input(x) is not None:
        return False
    # Inductor copies inputs that are not static and turn out misaligned, just before they are read
    names = V.graph.graph_input_names
    moved = V.graph.mutated_inputs | {names[index] for index in V.graph.inputs_to_check or ()}
    found = [_input(node) for node in constants if node is not None]
    return all(name is not None and name not in moved for name in found)


def _of_this_graph(name: str) -> dict[Any, Any]:
    """A cache with the lifetime of the graph that is being lowered."""
    caches: dict[str, dict[Any, Any]] = vars(V.graph).setdefault("rana_fx", {})
    return caches.setdefault(name, {})


def _input(node: Any) -> str | None:
    """The name of the graph's input that a node is a view of."""
    while isinstance(node, (ir.TensorBox, ir.StorageBox, ir.BaseView)):
        node = node.data
    return node.get_name() if isinstance(node, ir.InputBuffer) else None


def _layout_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device


@contextlib.contextmanager
def _mutations_without_pdl() -> Iterator[None]:
    """Inductor infers from a kernel's code which operands it writes. The analysis does not support the instructions of dependent
    launch and would mark every operand as written, weights too: inside, it runs on the kernel compiled with PDL=False.
    """
    with contextlib.ExitStack() as stack:
        for name in ("identify_mutated_tensors", "identify_accessed_tensors"):  # torch 2.11, 2.13
            found = getattr(triton_kernel_wrap, name, None)
            if found is not None:
                stack.enter_context(patch.object(triton_kernel_wrap, name, functools.partial(_without_pdl, found)))
        yield


def _without_pdl(analyse: Callable[..., Any], kernel: Any, given: dict[str, Any], *rest: Any) -> Any:
    # the analysis compiles the kernel: once for launches that differ only by their buffers
    cached = _of_this_graph("writes")
    key = (id(kernel), *((name, value.get_dtype() if isinstance(value, ir.IRNode) else value) for name, value in given.items()))
    if key not in cached:
        cached[key] = analyse(kernel, given | {"PDL": False} if "PDL" in given else given, *rest)
    return cached[key]


def _codegen_with_pdl(node: ir.UserDefinedTritonKernel, wrapper: Any) -> None:
    """The kernel's codegen, with the option for dependent launch in its ``triton_meta``."""
    define = wrapper.define_kernel

    def with_option(name: str, body: str, *args: Any, **kwargs: Any) -> Any:
        assert body.count("triton_meta={") == 1, name
        return define(name, body.replace("triton_meta={", "triton_meta={'launch_pdl': True, "), *args, **kwargs)

    wrapper.define_kernel = with_option
    try:
        type(node).codegen(node, wrapper)
    finally:
        del wrapper.define_kernel
