"""Store weights so that a skipped column is contiguous, without changing values, shapes or the memory they take.

    weight (out, in), row-major      becomes      weight (out, in) with strides (1, out)

In: the weights a plan multiplies by column (neuron adapters keep the model's own weight and skip inputs, that is columns).
Out: the same Parameters, column-major, so that a kernel reads or skips a contiguous row of W^T. A weight that is already
column-major is left as it is. So is one that shares its memory with another tensor of the model, with other processes
(``share_memory_()``) or with a mapped file: it would no longer be shared. Its matmul then stays dense.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rana_fx.ordinary import has_data, is_shared


def by_columns_(weights: Iterable[nn.Parameter], among: Iterable[Tensor]) -> list[nn.Parameter]:
    """Make weights column-major in place; returns those that were changed. ``among``: all Parameters and buffers of the model."""
    owners: dict[int, set[int]] = {}
    for tensor in among:
        if has_data(tensor) and tensor.numel():
            owners.setdefault(tensor.untyped_storage().data_ptr(), set()).add(id(tensor))
    changed = []
    for weight in filter(_may_move, weights):
        storage = weight.untyped_storage()
        whole = storage.nbytes() == weight.numel() * weight.element_size()
        if weight.dim() == 2 and weight.is_contiguous() and whole and owners.get(storage.data_ptr()) == {id(weight)}:
            # .data: the Parameter stays the same object for optimizers, and autograd records nothing
            with torch.inference_mode(weight.is_inference()):
                weight.data = weight.data.t().contiguous().t()
            changed.append(weight)
    return changed


def _may_move(weight: nn.Parameter) -> bool:
    return has_data(weight) and not is_shared(weight)


def by_rows_(weights: Iterable[nn.Parameter]) -> None:
    """Make weights row-major again, in place."""
    for weight in weights:
        with torch.inference_mode(weight.is_inference()):
            weight.data = weight.data.contiguous()


def why_by_rows(weight: nn.Parameter) -> str | None:
    """The reason why ``by_columns_`` did not change a weight; None where it is column-major."""
    if weight.dim() != 2 or not weight.is_contiguous() or 1 in weight.shape:
        return None
    if is_shared(weight):
        return "its memory is shared with other processes or is a mapped file, so it stays stored by rows"
    return "its memory is shared with another tensor, so it stays stored by rows"
