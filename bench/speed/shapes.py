"""Matmul shapes of one decoding step, from the sizes of a few models.

In: names such as ``llama-2-7b``, of one matmul ``llama-2-7b/qkv``, or ``llama-2-7b/router:2384`` for a router of so many
ranks. Out: K inputs (or ranks) and N outputs of each.
"""

from __future__ import annotations

from typing import NamedTuple

from rana_fx.errors import UnknownChoice


class Model(NamedTuple):
    """Hidden size, MLP size, width of all query heads, width of all key heads, whether the MLP is gated."""

    hidden: int
    ffn: int
    queries: int
    keys: int
    gated: bool


class Shape(NamedTuple):
    """One matmul. op: masked_gemv, gated_gemv (the same with silu(gate) * up fused) or router."""

    name: str
    op: str
    K: int
    N: int


MODELS = {
    "llama-2-7b": Model(4096, 11008, 4096, 4096, True),
    "llama-3-8b": Model(4096, 14336, 4096, 1024, True),
    "gemma-2b": Model(2048, 16384, 2048, 256, True),
    "pythia-1.4b": Model(2048, 8192, 2048, 2048, False),
    "toy": Model(64, 128, 64, 32, True),
}


def shapes_of(model: str) -> list[Shape]:
    """qkv, gate+up (or up), down, o, a router of 11/16 of the ranks and, if gated, gate+up with its activation."""
    size = MODELS[model]
    wide = size.ffn * (2 if size.gated else 1)
    found = [
        Shape("qkv", "masked_gemv", size.hidden, size.queries + 2 * size.keys),
        Shape("gate+up" if size.gated else "up", "masked_gemv", size.hidden, wide),
        Shape("down", "masked_gemv", size.ffn, size.hidden),
        Shape("o", "masked_gemv", size.queries, size.hidden),
        Shape("router", "router", size.hidden, size.hidden * 11 // 16),
    ]
    if size.gated:
        found.append(Shape("silu(gate)*up", "gated_gemv", size.hidden, wide))
    return [shape._replace(name=f"{model}/{shape.name}") for shape in found]


def shapes(names: list[str]) -> list[Shape]:
    """Shapes by model name (all matmuls), by matmul name or as routers of a number of ranks. Raises UnknownChoice."""
    known = {shape.name: shape for model in MODELS for shape in shapes_of(model)}
    chosen = []
    for name in names:
        if name in MODELS:
            chosen += shapes_of(name)
        elif name in known:
            chosen.append(known[name])
        elif (router := known.get(name.partition(":")[0])) and router.op == "router" and name.partition(":")[2].isdecimal():
            chosen.append(router._replace(name=name, N=int(name.partition(":")[2])))
        else:
            raise UnknownChoice(kind="shape", got=name, valid=", ".join([*MODELS, *known]))
    return chosen
