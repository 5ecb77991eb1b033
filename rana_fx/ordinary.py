"""Ordinary tensors: strided tensors whose memory may be read, compared, stored in another layout or freed.

In: any tensor of a model. Out: whether the tensor is ordinary, and a description if it is not. Wrapper subclasses (quantised
weights, DTensor), fake tensors and other subclasses with ``__torch_function__`` or ``__torch_dispatch__`` manage their memory
themselves: only their shape, dtype and device are read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter


def is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor is a strided Tensor or Parameter without overrides. Meta tensors are ordinary, without data."""
    kind = type(tensor)
    if kind not in (Tensor, nn.Parameter) and not _computes_as_parameter(kind):
        return False
    return (
        tensor.layout is torch.strided and not tensor.is_quantized and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def has_data(tensor: Tensor) -> bool:
    """Whether a tensor is ordinary and has data: meta tensors represent weights that are stored elsewhere or not loaded."""
    return is_ordinary(tensor) and tensor.device.type != "meta"


def wrapped(tensor: Tensor) -> str:
    """Description of a tensor that is not ordinary, as the reason of a skip."""
    return f"quantised or wrapped weight ({type(tensor).__name__})"


def is_shared(tensor: Tensor) -> bool:
    """Whether an ordinary tensor is in shared memory or a mapped file on the CPU, and must not be moved to other memory."""
    if tensor.device.type != "cpu":
        return False  # PyTorch reports every tensor on a GPU as shared
    storage = tensor.untyped_storage()
    return bool(storage.is_shared()) or storage.filename is not None


def _computes_as_parameter(kind: Any) -> bool:
    """Whether a type is a subclass of Parameter without overrides. (Subclasses of Tensor yield results of their own type.)"""
    if nn.Parameter not in kind.__mro__ or issubclass(kind, UninitializedParameter):
        return False
    plain: bool = kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    return plain and kind.__torch_function__ is nn.Parameter.__torch_function__
