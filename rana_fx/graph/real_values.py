"""The real tensor of a graph input, and Dynamo's source of it.

In: a placeholder and its example value, which may be fake: backends that split a Dynamo graph and compile the pieces
(DistributedDataParallel's buckets) pass fake tensors, as may any backend that wraps this one. Out: the real tensor, from
Dynamo's record of the placeholder, from its source among the inputs of the frame being compiled, or from the table of the
fake mode.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch._subclasses import FakeTensor


def real_value(node: fx.Node, value: object) -> object:
    """``value``, or the real tensor that a fake one was made from; a fake tensor whose real one is unknown is returned."""
    if not isinstance(value, FakeTensor):
        return value
    recorded = _example(node.meta.get("grapharg"))
    if recorded is None:
        recorded = _example(_arguments().get(getattr(node, "_dynamo_source", None)))
    return value if recorded is None and (recorded := _fakified(value)) is None else recorded


def source_of(node: fx.Node, value: object = None) -> Any:
    """Dynamo's source of a graph input, or None. ``value``: the real tensor, which is looked up if the node has no source."""
    source = getattr(node, "_dynamo_source", None) or getattr(node.meta.get("grapharg"), "source", None)
    if source is not None or value is None:
        return source
    return next((known for known, argument in _arguments().items() if _example(argument) is value), None)


def translator() -> Any:
    """The instruction translator of the outermost frame that Dynamo is compiling; None outside of a compilation."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output.root_tx
    except (AttributeError, RuntimeError):
        return None


def root_of(source: Any) -> Any:
    """The source of the local or global variable at the root of a source."""
    while getattr(source, "base", None) is not None:
        source = source.base
    return source


def local(source: object) -> object:
    """The value of a local variable of the frame that is being compiled, or None."""
    # the frame's locals are held by the translator of the outermost function
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
    except AssertionError:  # its tensor was freed
        return None
    return found if isinstance(found, Tensor) and not isinstance(found, FakeTensor) else None


def _fakified(value: FakeTensor) -> Tensor | None:
    """The tensor that a fake one was made from, while both exist."""
    try:
        converter = value.fake_mode.fake_tensor_converter.meta_converter
        numbers = list(converter.describer.lookup_tensor.items())
        return next((real for real, number in numbers if converter.tensor_memo.get(number) is value), None)
    except AttributeError:  # of another version of PyTorch
        return None
