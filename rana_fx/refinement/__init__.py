"""Refine a plan: a short distillation from the dense model, after the recipe (docs/explanation/recipes.md).

In: a model, the adapters of a plan, and its calibration text. Out: adapters of the same kinds and cost with trained factors and
biases, if they move the model's predictions less on text that the training did not see. Importing this loads no torch.
"""

from rana_fx.refinement.settings import Refine

__all__ = ["Refine"]
