"""Low-rank additions to matrices of an adapted model (LoRA), while they are trained.

In: Parameters of the model or of its plan's factors, and the layers that ``peft`` made for them (training/lora.py). Out: a module
that holds those layers, and lists for each Parameter what is added to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER = "default"  # peft's name for the only adapter of a layer


class Matrix(nn.Linear):
    """A Parameter as the base linear of a layer of peft. ``transposed``: the Parameter is (in, out)."""

    weight: nn.Parameter

    def __init__(self, parameter: nn.Parameter, *, transposed: bool) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = parameter.shape[::-1] if transposed else parameter.shape
        self.transposed = transposed
        self.register_parameter("weight", parameter)
        self.register_parameter("bias", None)

    def unregister(self) -> None:
        """Keep the Parameter as a plain attribute: the module that it belongs to saves, moves and counts it."""
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
        """The term that is added, in the orientation of the matrix, fp64."""
        delta = self.scaling * (self.b.detach().double() @ self.a.detach().double())
        return delta.t() if self.transposed else delta


class LowRank(nn.Module):
    """Layers of peft by the names of their matrices, and the current probability of dropout: 0 in evaluation mode.

    A graph reads that probability as a tensor, since compiled code has no guard on the mode of a module that is not traced.
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
        """The mode. Set by ``train()``, and by code that sets the attribute of every module; the setter updates ``dropout``."""
        return bool(self.__dict__.get("_training", True))

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["_training"] = mode
        if "_buffers" in self.__dict__ and "dropout" in self._buffers:
            # .data: a teacher may run in evaluation mode between a forward pass and its backward pass, which saved the tensor
            self.dropout.data.fill_(self.rate if mode else 0.0)

    def extra_repr(self) -> str:
        return f"dropout {self.rate:g}, scaling {sorted({addition.scaling for addition in self.additions()})}"

    def additions(self) -> Iterator[Addition]:
        """The low-rank addition of every layer."""
        for name, module in self.adapters.named_modules():
            layer: Any = module
            base = getattr(layer, "base_layer", None)
            if isinstance(base, Matrix):
                a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
                yield Addition(name, base.weight, base.transposed, a, b, float(layer.scaling[ADAPTER]))
