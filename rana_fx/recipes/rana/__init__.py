"""The default recipe: a Lagrangian rate allocation over all linears of the budget."""

from rana_fx.recipes.rana.recipe import Rana

__all__ = ["Rana"]
