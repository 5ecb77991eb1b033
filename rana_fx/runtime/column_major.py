"""Store weights so that what a token skips is contiguous, without changing a value, a shape or the memory they take.

    weight (out, in), row-major      becomes      weight (out, in) with strides (1, out)

In: the weights a plan multiplies by column (neuron adapters keep the model's own weight and skip inputs, that is columns).
Out: the same Parameters, each column in one piece, so that a kernel reads whole rows of W^T or nothing. A weight that is
already stored so, or that shares its memory with something else, is left alone, and its product stays a dense one.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def by_columns_(weights: Iterable[nn.Parameter], among: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Re-lay in place; returns those that were changed. ``among``: all Parameters of the model."""
    owners: dict[int, set[int]] = {}
    for parameter in among:
        if parameter.numel():
            owners.setdefault(parameter.untyped_storage().data_ptr(), set()).add(id(parameter))
    changed = []
    for weight in weights:
        storage = weight.untyped_storage()
        whole = storage.nbytes() == weight.numel() * weight.element_size()
        if weight.dim() == 2 and weight.is_contiguous() and whole and owners.get(storage.data_ptr()) == {id(weight)}:
            # .data: neither autograd nor an optimizer that holds the Parameter shall notice
            weight.data = weight.data.t().contiguous().t()
            changed.append(weight)
    return changed


def by_rows_(weights: Iterable[nn.Parameter]) -> None:
    """Store those weights by rows again."""
    for weight in weights:
        weight.data = weight.data.contiguous()
