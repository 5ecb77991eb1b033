"""The real tensor behind an input of a graph, and Dynamo's source of it.

In: a placeholder and its example value, which may be fake: what splits a Dynamo graph and compiles the pieces
(DistributedDataParallel's buckets) passes fake tensors, and so may any backend around this one. Out: the tensor itself, by what
Dynamo recorded of the placeholder, by its source among the inputs of the frame that is compiled, or by the fake mode's own table.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch._subclasses import FakeTensor


def real_value(node: fx.Node, value: object) -> object:
    """``value``, or the real tensor that it stands for. A fake tensor whose tensor is not known is returned as it is."""
    if not isinstance(value, FakeTensor):
        return value
    recorded = _example(node.meta.get("grapharg"))
    if recorded is None:
        recorded = _example(_arguments().get(getattr(node, "_dynamo_source", None)))
    return value if recorded is None and (recorded := _fakified(value)) is None else recorded


def source_of(node: fx.Node, value: object = None) -> Any:
    """Dynamo's source of a graph input, or None. ``value``: the real tensor, which is looked for where the node has no source."""
    source = getattr(node, "_dynamo_source", None) or getattr(node.meta.get("grapharg"), "source", None)
    if source is not None or value is None:
        return source
    return next((known for known, argument in _arguments().items() if _example(argument) is value), None)


def translator() -> Any:
    """Of the outermost frame that Dynamo is compiling; None outside of a compilation."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output.root_tx
    except (AttributeError, RuntimeError):
        return None


def root_of(source: Any) -> Any:
    """The source of the local or global variable that a source starts from."""
    while getattr(source, "base", None) is not None:
        source = source.base
    return source


def local(source: object) -> object:
    """What a local variable of the frame that is being compiled holds, or None."""
    # the frame's locals live on the translator of the outermost function
    held: Any = getattr(translator(), "f_locals", {})
    return held.get(getattr(source, "local_name", ""), None)


def _arguments() -> dict[Any, Any]:
    """Inputs of the graph that Dynamo is compiling, by source."""
    try:
        return {argument.source: argument for argument in translator().output.graphargs}
    except (AttributeError, KeyError):
        return {}


def _example(argument: Any) -> Tensor | None:
    try:
        found = getattr(argument, "example", None)
    except AssertionError:  # its tensor is gone
        return None
    return found if isinstance(found, Tensor) and not isinstance(found, FakeTensor) else None


def _fakified(value: FakeTensor) -> Tensor | None:
    """The tensor that a fake one was made from, while both live."""
    try:
        converter = value.fake_mode.fake_tensor_converter.meta_converter
        numbers = list(converter.describer.lookup_tensor.items())
        return next((real for real, number in numbers if converter.tensor_memo.get(number) is value), None)
    except AttributeError:  # of another version of PyTorch
        return None
