"""Low-rank additions to matrices of an adapted model (LoRA), while they are trained.

In: Parameters of the model or of its plan's factors, and the layers that ``peft`` made for them (training/lora.py). Out: a module
that holds those layers, and tells by the identity of a Parameter what is added to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER = "default"  # peft's name for the only adapter of a layer


class Matrix(nn.Linear):
    """A Parameter as the linear that a layer of peft is made around. (in, out) ones are said to be ``transposed``."""

    weight: nn.Parameter

    def __init__(self, parameter: nn.Parameter, *, transposed: bool) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = parameter.shape[::-1] if transposed else parameter.shape
        self.transposed = transposed
        self.register_parameter("weight", parameter)
        self.register_parameter("bias", None)

    def lend(self) -> None:
        """Hold it without owning it: its own module does, and saves, moves and counts it."""
        self.__dict__["weight"] = self._parameters.pop("weight")


@dataclass(frozen=True, eq=False)
class Addition:
    """``scaling * b @ a`` (out, in) is added to ``matrix``, which is (in, out) if ``transposed``."""

    name: str
    matrix: nn.Parameter
    transposed: bool
    a: nn.Parameter
    b: nn.Parameter
    scaling: float

    def value(self) -> Tensor:
        """What is added, in the matrix's own orientation and in fp64."""
        delta = self.scaling * (self.b.detach().double() @ self.a.detach().double())
        return delta.t() if self.transposed else delta


class LowRank(nn.Module):
    """Layers of peft by the names of their matrices, and the probability of dropout as it is now: 0 outside of training.

    A graph reads that probability as a tensor. Compiled code would not notice a mode that no traced module has.
    """

    dropout: Tensor

    def __init__(self, matrices: Mapping[str, Matrix], dropout: float, device: torch.device) -> None:
        super().__init__()
        self.rate = dropout
        self.register_buffer("dropout", torch.tensor(dropout, device=device), persistent=False)
        self.adapters = nn.Module()
        for path, matrix in matrices.items():
            *parents, name = path.split(".")
            owner = self.adapters
            for parent in parents:
                if not hasattr(owner, parent):
                    owner.add_module(parent, nn.Module())
                owner = owner.get_submodule(parent)
            owner.add_module(name, matrix)

    @property
    def training(self) -> bool:
        """Set by ``train()`` and by whoever sets it on every module."""
        return bool(self.__dict__.get("_training", True))

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["_training"] = mode
        if "_buffers" in self.__dict__ and "dropout" in self._buffers:
            # .data: between a forward and its backward pass a teacher may be called, in evaluation mode
            self.dropout.data.fill_(self.rate if mode else 0.0)

    def extra_repr(self) -> str:
        return f"dropout {self.rate:g}, scaling {sorted({addition.scaling for addition in self.additions()})}"

    def additions(self) -> Iterator[Addition]:
        """All of them."""
        for name, module in self.adapters.named_modules():
            layer: Any = module
            base = getattr(layer, "base_layer", None)
            if isinstance(base, Matrix):
                a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
                yield Addition(name, base.weight, base.transposed, a, b, float(layer.scaling[ADAPTER]))
