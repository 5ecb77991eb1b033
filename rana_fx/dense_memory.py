"""Free the memory of dense weights that factors have replaced (``options={"prefill": "factors"}``).

    weight (out, in), out * in numbers      becomes      weight (out, in) with strides (0, 0), one NaN

In: Parameters that no graph reads any more. Out: the same Parameters with the same name, shape, dtype and device, so that
modules print, graphs are traced and guards hold as before; reading one by accident yields NaN and not arbitrary values. Only the
checkpoint restores the weight: a new model, or ``load_state_dict(..., assign=True)``, since no value can be copied into an
expanded tensor. A deep copy, or ``.to(...)``, of such a Parameter is a full tensor of NaN.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from rana_fx.ordinary import has_data


def free_(weight: nn.Parameter) -> None:
    """Free the memory of a weight, irreversibly: its values become NaN."""
    # .data: the Parameter stays the same object, so that all references to it see the freed tensor
    with torch.inference_mode(weight.is_inference()):  # a Parameter made in inference mode stays one
        weight.data = torch.full((), torch.nan, dtype=weight.dtype, device=weight.device).expand(weight.shape)


def is_freed(weight: Tensor) -> bool:
    """Whether ``free_`` freed this weight and no other data was assigned to it since."""
    if not has_data(weight) or weight.numel() < 2 or any(weight.stride()):
        return False
    return weight.untyped_storage().nbytes() == weight.element_size()


def unshared(model: nn.Module) -> frozenset[int]:
    """Ids of the Parameters that have one name in the model and share their memory with no other tensor of it."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    tensors = [tensor for _, tensor in named if has_data(tensor) and tensor.numel()]
    names = Counter(map(id, tensors))
    owners = Counter(map(_memory, {id(tensor): tensor for tensor in tensors}.values()))
    return frozenset(id(tensor) for tensor in tensors if names[id(tensor)] == 1 and owners[_memory(tensor)] == 1)


def _memory(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()
