"""The dense MLP on given rows of its input: outputs of its up projections, and the hidden values that down reads."""

from __future__ import annotations

import torch
from torch import Tensor

from rana_fx.calibration.layout import MlpBlock
from rana_fx.recipes.problem import Problem


def up_outputs(problem: Problem, block: MlpBlock, rows_TI: Tensor) -> list[Tensor]:
    """The dense model's outputs of ``block.ups`` for rows of the block's input, (tokens, out) each, fp32."""
    return [torch.nn.functional.linear(rows_TI.float(), problem.matrix((up,)), problem.bias((up,))) for up in block.ups]


def hidden_rows(problem: Problem, block: MlpBlock, rows_TI: Tensor) -> Tensor:
    """The dense model's input of ``block.down`` for rows of the block's input, (tokens, ffn), fp32."""
    return block.pointwise(*up_outputs(problem, block, rows_TI)).float()
