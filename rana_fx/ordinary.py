"""Which tensors are ordinary: numbers in a memory that may be read, compared, stored otherwise or freed.

In: any tensor that a model holds. Out: whether it is one, and what it is otherwise. Wrapper subclasses (quantised weights,
DTensor), fake tensors and whatever else computes by ``__torch_function__`` or ``__torch_dispatch__`` has its own idea of memory:
nothing but its shape, dtype and device is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter


def is_ordinary(tensor: Tensor) -> bool:
    """Whether it is a strided tensor, or a Parameter, that computes as PyTorch's own do. Meta tensors are, without data."""
    kind = type(tensor)
    if kind not in (Tensor, nn.Parameter) and not _computes_as_parameter(kind):
        return False
    return (
        tensor.layout is torch.strided and not tensor.is_quantized and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def has_data(tensor: Tensor) -> bool:
    """Whether it is ordinary and its numbers exist: meta tensors stand for weights that are elsewhere."""
    return is_ordinary(tensor) and tensor.device.type != "meta"


def wrapped(tensor: Tensor) -> str:
    """What is not ordinary, as a reason to leave it alone."""
    return f"quantised or wrapped weight ({type(tensor).__name__})"


def is_shared(tensor: Tensor) -> bool:
    """Whether an ordinary tensor's memory is seen by other processes, or is a mapped file: it has to stay where it is."""
    if tensor.device.type != "cpu":
        return False  # on a GPU every tensor says so
    storage = tensor.untyped_storage()
    return bool(storage.is_shared()) or storage.filename is not None


def _computes_as_parameter(kind: Any) -> bool:
    """A subclass of Parameter without overrides. (One of Tensor makes results of its own class.)"""
    if nn.Parameter not in kind.__mro__ or issubclass(kind, UninitializedParameter):
        return False
    plain: bool = kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    return plain and kind.__torch_function__ is nn.Parameter.__torch_function__
