"""Graph passes: from a traced graph and the plan on its weights to a graph of ``rana::`` operations.

Every pass is in one of three tuples, in the order in which ``rana_fx.passes.runner`` runs them; nothing else changes a graph.
A pass follows ``rana_fx.passes.base``: a function over (graph module, context) that returns a ``PassResult``.

    NORMALIZE     a Dynamo graph before linears are searched in it (rana_fx/graph/normalize.py; calibration runs it, too)
    PRE_GRAD      the same graph, after the plan's linears are found in it (match.py): linears become rana operations
    POST_GRAD     Inductor's graph, past autograd: operations around rana operations are fused into their launches
"""

from __future__ import annotations

from rana_fx.graph.normalize import NORMALIZE
from rana_fx.passes.base import EachMatch, Pass, PostGrad, PreGrad
from rana_fx.passes.check_foreign_lora import check_foreign_lora
from rana_fx.passes.check_freed import check_freed
from rana_fx.passes.check_rewritten import check_rewritten
from rana_fx.passes.decompose_transformed import decompose_transformed
from rana_fx.passes.drop_recompute_tags import drop_recompute_tags
from rana_fx.passes.fuse_gated import fuse_gated
from rana_fx.passes.fuse_norm import fuse_norm
from rana_fx.passes.fuse_product_norm import fuse_product_norm
from rana_fx.passes.fuse_repeated_heads import fuse_repeated_heads
from rana_fx.passes.fuse_residual import fuse_residual
from rana_fx.passes.fuse_same_input import fuse_same_input
from rana_fx.passes.rewrite_adapter import rewrite_adapter
from rana_fx.passes.rewrite_attention import rewrite_attention
from rana_fx.passes.rewrite_gated import rewrite_gated
from rana_fx.passes.rewrite_lora import rewrite_lora

PRE_GRAD: tuple[Pass[PreGrad], ...] = (
    # before any rewrite: it checks what is added to planned linears, which the rewrites replace
    check_foreign_lora,
    # before the other rewrites: it recognises the gate by its linear, which they would replace
    EachMatch(rewrite_gated),
    EachMatch(rewrite_adapter),
    # after every rewrite of linears: none that the plan names may be left
    check_rewritten,
    # after the rewrites, which find linears by their weight: it adds LoRA's term to every use of a matrix that is left
    rewrite_lora,
    # after what puts factors and LoRA into the graph: where these are trained, gradients flow through attention
    rewrite_attention,
    # after the rewrites, which make operations and find each other's
    decompose_transformed,
    # after what tags nodes, and with all that may be trained in the graph
    drop_recompute_tags,
    # last: only the final graph shows which weights are still read
    check_freed,
)

POST_GRAD: tuple[Pass[PostGrad], ...] = (
    # first: a norm is recognised by its inputs, before the masked matmuls that compute them are fused
    fuse_norm,
    # before the gate: a masked matmul whose output is only added to has no gate behind it
    fuse_residual,
    fuse_gated,
    # after the gate: a matmul in a shared launch has no epilogue, and an epilogue of its own saves more
    fuse_same_input,
    # after the shared launch, which takes no norm and saves more; and after the gate, which it keeps
    fuse_product_norm,
    # anywhere: no other pass reads attention or changes its operands
    fuse_repeated_heads,
)

__all__ = ["NORMALIZE", "POST_GRAD", "PRE_GRAD"]
