"""A weight as quantisation libraries put it into a model: a wrapper subclass without memory of its own."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing

aten = torch.ops.aten
_COPIES = (aten.detach.default, aten.alias.default, aten.clone.default)


class Int8(torch.Tensor):
    """Rows of int8 and their scales, without views. ``asked``: how often its memory was asked for (Dynamo does that, too)."""

    asked = 0

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)

    def __init__(self, values, scale):
        self.values_, self.scale_ = values, scale

    def __tensor_flatten__(self):
        return ["values_", "scale_"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):  # noqa: ARG003
        return cls(inner["values_"], inner["scale_"])

    def __repr__(self):
        return "Int8"

    def data_ptr(self):
        Int8.asked += 1
        return super().data_ptr()

    def untyped_storage(self):
        Int8.asked += 1
        return super().untyped_storage()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # noqa: ARG003
        if func is nn.functional.linear:
            return nn.functional.linear(args[0], args[1].values_.to(args[0].dtype)) * args[1].scale_
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):  # noqa: ARG003
        if func in _COPIES:
            copied = cls(func(args[0].values_), func(args[0].scale_))
            return return_and_correct_aliasing(func, args, kwargs or {}, copied)
        raise NotImplementedError(func)


def quantise_(linear: nn.Linear) -> None:
    """In place."""
    weight = linear.weight.detach()
    scale = weight.abs().amax(1) / 127
    linear.weight = nn.Parameter(Int8((weight / scale[:, None]).round().to(torch.int8), scale), requires_grad=False)
