"""RaNA as published (ICLR 2025, arXiv 2503.18216)."""

from rana_fx.recipes.paper.recipe import Paper

__all__ = ["Paper"]
