"""Low-rank additions to matrices of an adapted model (LoRA), while they are trained.

In: Parameters of the model or of its plan's factors, and two small matrices for each. Out: a module that holds those, and tells
by the identity of a Parameter what is to be added to it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """Of each matrix (out, in): ``up`` (out, r) and ``down`` (r, in), fp32; the addition is alpha / r * up @ down."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        # a tuple hides the Parameters from Module: they are the model's
        self._matrices: list[tuple[str, nn.Parameter]] = []

    def add(self, name: str, matrix: nn.Parameter, *, up: Tensor, down: Tensor) -> None:
        """Begin to add to a matrix."""
        key = name.replace(".", "/")
        self.register_parameter(f"{key}/up", nn.Parameter(up))
        self.register_parameter(f"{key}/down", nn.Parameter(down))
        self._matrices.append((key, matrix))

    def of(self, parameter: object) -> tuple[str, nn.Parameter, nn.Parameter, float] | None:
        """(name, up, down, scale) of what is added to a Parameter, if anything is."""
        key = next((key for key, matrix in self._matrices if matrix is parameter), None)
        if key is None:
            return None
        up, down = self.get_parameter(f"{key}/up"), self.get_parameter(f"{key}/down")
        return key, up, down, self.alpha / len(down)

    def additions(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """(matrix, what is added to it in fp64)."""
        for _, matrix in self._matrices:
            found = self.of(matrix)
            assert found is not None
            _, up, down, scale = found
            yield matrix, scale * (up.detach().to(torch.float64) @ down.detach().to(torch.float64))
