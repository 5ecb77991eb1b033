"""Store weights so that a skipped column is contiguous, without changing values, shapes or the memory they take.

    weight (out, in), row-major      becomes      weight (out, in) with strides (1, out)

In: the weights a plan multiplies by column (neuron adapters keep the model's own weight and skip inputs, that is columns).
Out: the same Parameters, column-major, so that a kernel reads or skips a contiguous row of W^T. A weight that is already
column-major is left as it is; so is one that shares its memory with another tensor, whose matmul then stays dense.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def by_columns_(weights: Iterable[nn.Parameter], among: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Make weights column-major in place; returns those that were changed. ``among``: all Parameters of the model."""
    owners: dict[int, set[int]] = {}
    for parameter in among:
        if parameter.numel():
            owners.setdefault(parameter.untyped_storage().data_ptr(), set()).add(id(parameter))
    changed = []
    for weight in weights:
        storage = weight.untyped_storage()
        whole = storage.nbytes() == weight.numel() * weight.element_size()
        if weight.dim() == 2 and weight.is_contiguous() and whole and owners.get(storage.data_ptr()) == {id(weight)}:
            # .data: the Parameter stays the same object for optimizers, and autograd records nothing
            weight.data = weight.data.t().contiguous().t()
            changed.append(weight)
    return changed


def by_rows_(weights: Iterable[nn.Parameter]) -> None:
    """Make weights row-major again, in place."""
    for weight in weights:
        weight.data = weight.data.contiguous()
