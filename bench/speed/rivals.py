"""Quantised models of other libraries that ``bench.decode`` compares with: a table of ``Rival``.

In: a model whose linears are ``nn.Linear``. Out: a copy with quantised linears, from ``quantised``. Packages are imported when a
rival is used: a missing one, or a device without the kernel, is an error with its reason.

    int8      torchao's int8 weight-only: a scale per output
    fp8       torchao's float8 weight-only: a scale per output
    int4      torchao's int4 weight-only by tinygemm (packing format tile_packed_to_4d): groups of 64 inputs, bf16 on a GPU only
    gemlite   gemlite's A16W4 (HQQ's format): groups of 64 inputs, on a GPU only; the output head stays as it is

All round to nearest. torchao sets options of Inductor for the process while it quantises; ``quantised`` restores them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._inductor import config as inductor

from bench.speed.rival_matmuls import GROUP, gemlite_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Rival:
    """``quantise``: changes the linears of those names in place. ``head``: whether the output head is one of them.

    ``group``: what the inputs of a linear have to be a multiple of; libraries leave other linears dense without an error.
    """

    quantise: Callable[[nn.Module, set[str]], None]
    bytes_per_weight: float
    head: bool = True
    group: int = 1


def linears_of(model: PreTrainedModel, rival: Rival) -> dict[str, nn.Linear]:
    """The linears that the rival quantises, by name.

    Raises:
        ValueError: there are none, or one of them does not fit the rival's groups.
    """
    left_out = None if rival.head else model.get_output_embeddings()
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not left_out}
    if not found:
        raise ValueError("the model has no nn.Linear to quantise")
    for name, module in found.items():
        if module.in_features % rival.group:
            raise ValueError(f"{name}: {module.in_features} inputs are no multiple of {rival.group}")
    return found


@contextmanager
def quantised(model: PreTrainedModel, rival: Rival) -> Iterator[tuple[PreTrainedModel, frozenset[int]]]:
    """Inside: a quantised copy of the model, and the ids of the model's own weights that are quantised in the copy."""
    chosen = linears_of(model, rival)
    options, precision = inductor.get_config_copy(), torch.get_float32_matmul_precision()
    try:
        changed = copy.deepcopy(model)
        rival.quantise(changed, set(chosen))
        yield changed, frozenset(id(linear.weight) for linear in chosen.values())
    finally:
        inductor.load_config(options)
        torch.set_float32_matmul_precision(precision)


def _by_torchao(config: Callable[[Any], Any]) -> Callable[[nn.Module, set[str]], None]:
    """``config``: makes a configuration, given the module ``torchao.quantization``."""

    def quantise(model: nn.Module, names: set[str]) -> None:
        from torchao import quantization

        quantization.quantize_(model, config(quantization), filter_fn=lambda _, name: name in names)

    return quantise


def _by_gemlite(model: nn.Module, names: set[str]) -> None:
    for name in names:
        parent, _, last = name.rpartition(".")
        linear = model.get_submodule(name)
        setattr(model.get_submodule(parent), last, gemlite_layer(linear.weight, linear.bias))


# 4 bits and, for each group, a scale and a zero point in bf16
_INT4 = 0.5 + 4 / GROUP

RIVALS: dict[str, Rival] = {
    "int8": Rival(_by_torchao(lambda ao: ao.Int8WeightOnlyConfig()), 1.0),
    "fp8": Rival(_by_torchao(lambda ao: ao.Float8WeightOnlyConfig()), 1.0),
    "int4": Rival(
        _by_torchao(lambda ao: ao.Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")),
        _INT4,
        group=GROUP,
    ),
    "gemlite": Rival(_by_gemlite, _INT4, head=False, group=GROUP),
}
