"""A model as a caller passes it: the module behind wrappers, its weights by site name, its device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rana_fx.graph.linears import site_name
from rana_fx.ordinary import has_data, is_ordinary, wrapped

_WRAPPED = "_orig_mod"  # where torch.compile(module) keeps the module


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel and DistributedDataParallel, whose weight names plans use."""
    while True:
        if isinstance(model, torch._dynamo.OptimizedModule):
            model = getattr(model, _WRAPPED)
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Site name -> Parameter; tied ones under each of their names. Compiling a module in place does not change its names."""
    named = unwrap(model).named_parameters(remove_duplicate=False)
    return {site_name(name.replace(f"{_WRAPPED}.", "")): parameter for name, parameter in named}


def names_of(model: nn.Module) -> dict[int, str]:
    """id of each Parameter -> its (first) site name."""
    names: dict[int, str] = {}
    for name, parameter in weights_of(model).items():
        names.setdefault(id(parameter), name)
    return names


def quantised_modules(model: nn.Module) -> dict[str, str]:
    """Name -> description of each module that holds a quantised matrix in a form that no linear of a graph shows."""
    found = {}
    for name, module in unwrap(model).named_modules():
        matrices = [str(buffer.dtype) for buffer in module.buffers(recurse=False) if _is_packed(buffer)]
        # what numbers in integers are for, only the module knows; where a graph shows it as a linear, that is reported
        matrices += [str(weight.dtype) for weight in module.parameters(recurse=False) if _is_packed(weight, whole=True)]
        if hasattr(module, "_packed_params") and not isinstance(module._packed_params, nn.Module):
            continue  # only the container of the packed weight: the layer is the module around it
        if type(module).__module__.partition(".")[0] == "rana_fx":
            continue  # factors of an attached plan
        if matrices or hasattr(module, "_packed_params"):
            found[name.replace(f"{_WRAPPED}.", "")] = f"quantised layer {type(module).__name__}" + "".join(
                f" ({m})" for m in matrices[:1]
            )
    return found


def _is_packed(tensor: Tensor, *, whole: bool = False) -> bool:
    """Whether it may be a quantised matrix. ``whole``: also one in a single row or column, as packed Parameters are."""
    if nn.parameter.is_lazy(tensor) or tensor.dtype not in (torch.int8, torch.uint8, torch.int32):
        return False
    return tensor.numel() > 1 if whole else tensor.dim() == 2 and min(tensor.shape) > 1


def wrapped_weights(model: nn.Module) -> dict[str, str]:
    """Site names of matrices that are wrapper subclasses, whose graphs may have only the inner tensors -> description."""
    shaped = {name: weight for name, weight in weights_of(model).items() if not nn.parameter.is_lazy(weight)}
    return {name: wrapped(weight) for name, weight in shaped.items() if not is_ordinary(weight) and weight.dim() > 1}


def absent_weight(model: nn.Module) -> str | None:
    """The name of a Parameter without data (on the meta device), or None: not loaded, or offloaded until it is used."""
    absent = (name for name, weight in unwrap(model).named_parameters() if weight.device.type == "meta")
    return next(absent, None)


@contextmanager
def trainable_tensors(model: nn.Module) -> Iterator[None]:
    """Inside, Parameters and buffers that were made in inference mode are replaced by ordinary ones in the same memory.

    Autograd rejects tensors of inference mode, also as tensors saved for the backward pass.
    """
    changed: list[tuple[dict[str, Any], str, Tensor]] = []
    held: Any
    twins: dict[int, Tensor] = {}  # tied tensors stay tied
    with torch.inference_mode(False), torch.no_grad():
        for module in unwrap(model).modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None and has_data(tensor) and tensor.is_inference():
                        changed.append((held, name, tensor))
                        twins.setdefault(id(tensor), _twin(tensor))
    try:
        for held, name, tensor in changed:
            held[name] = twins[id(tensor)]
        yield
    finally:
        for held, name, tensor in changed:
            held[name] = tensor


def _twin(tensor: Tensor) -> Tensor:
    made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    made.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
