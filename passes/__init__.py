"""Graph passes: from a traced graph and the plan on its weights to a graph of ``rana::`` operations.

``PIPELINE`` is the order. Each rewrite takes (graph_module, match) and returns the number of linears it replaced; it
declines matches of other kinds. ``run`` (rana_fx.passes.runner) owns matching, dumps, verification and clean-up.
"""

from __future__ import annotations

from rana_fx.passes.rewrite_adapter import rewrite_adapter
from rana_fx.passes.rewrite_gated import rewrite_gated

PIPELINE = (
    rewrite_gated,  # first: it recognises the gate by its linear, which the next one would replace
    rewrite_adapter,
)

__all__ = ["PIPELINE"]
