"""Specification of a random example: a small Transformer, its plan, the options of its compilation, and the calls.

In: draws of hypothesis. Out: a ``Spec``. It has no tensors, so that hypothesis can shrink it and a row of JSON can hold it; all
random tensors are made from its seed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hypothesis import strategies as st

RECIPES = ("rana", "paper", "static", "cats", "teal", "wina")
KINDS = ("rank", "static", "hybrid", "exact", "neuron", "own", "stored", "gated", "dense")
BITS = (16, 8, 4)

ATTENTION = ("separate", "packed", "shared_keys", "none")
MLPS = ("plain", "gated", "packed")
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
NORMS = ("layer", "rms", "none")
FORMS = ("linear", "addmm", "matmul", "by_inputs", "einsum", "tensordot")
DROPOUTS = ("none", "hidden", "residual", "training")
CASTS = ("none", "hidden", "gate", "input")
WRITES = ("none", "in_place", "out", "slice", "view", "copy", "hidden", "foreach")
BRANCHES = ("none", "python", "break", "break_in_mlp", "hook", "checkpoint", "cond")
CACHES = ("none", "static", "growing")
PREFILL = ("masked", "dense", "cheapest", "factors")


@dataclass(frozen=True)
class Spec:
    """One example. Sizes are numbers of features; ``calls``: (sequences, tokens) of each call, in order."""

    seed: int
    width: int
    heads: int
    ffn: int
    layers: int
    attention: str
    mlp: str
    activation: str
    norm: str
    form: str
    bias: bool
    parallel: bool  # attention and MLP read one tensor
    tied: bool  # the head is the embedding
    shared: bool  # every layer is the same module
    dropout: str
    cast: str
    write: str
    branch: str
    cache: str
    dtype: str
    plan: str  # a recipe, or "drawn": adapters of random kinds and storage, made from the weights
    kinds: tuple[str, ...]
    router_bits: int
    bits: int
    density: float  # fraction of thresholds of random masks that are zero (kept); the others are infinity
    shift: bool
    budget: float
    prefill: str
    dynamic: bool
    gradients: bool
    strict: bool
    as_option: bool  # the plan is an option of the backend instead of attached
    calls: tuple[tuple[int, int], ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields as values that JSON can hold."""
        return asdict(self)


def _shapes(tokens: tuple[int, ...]) -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    return st.lists(st.tuples(st.sampled_from((1, 2, 3)), st.sampled_from(tokens)), min_size=1, max_size=3).map(tuple)


def _mostly(usual: str, all_of: tuple[str, ...]) -> st.SearchStrategy[str]:
    """The usual value in at least two of three cases: an example with all unusual settings would show only the first fault."""
    return st.one_of(st.just(usual), st.just(usual), st.sampled_from(all_of))


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Any valid example. bf16 has only thresholds of zero and infinity, on which rounding has no effect."""
    heads = draw(st.sampled_from((1, 2, 4)))
    dtype = draw(_mostly("float32", ("float32", "bfloat16")))
    plan = "drawn" if dtype == "bfloat16" else draw(st.sampled_from(("drawn", *RECIPES)))
    cache = draw(_mostly("none", CACHES))
    prefill = draw(_mostly("masked", PREFILL))
    gradients = prefill == "masked" and cache == "none" and draw(st.sampled_from((False, False, True)))
    return Spec(
        seed=draw(st.integers(0, 2**16)),
        width=heads * draw(st.sampled_from((4, 6, 8, 10))),
        heads=heads,
        ffn=draw(st.sampled_from((8, 14, 24, 48, 66))),
        layers=draw(st.sampled_from((1, 1, 2))),
        attention=draw(st.sampled_from(ATTENTION)),
        mlp=draw(st.sampled_from(MLPS)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        norm=draw(st.sampled_from(NORMS)),
        form=draw(_mostly("linear", FORMS)),
        bias=draw(st.booleans()),
        parallel=draw(st.booleans()),
        tied=draw(st.booleans()),
        shared=draw(st.sampled_from((False, False, True))),
        dropout=draw(_mostly("none", DROPOUTS)),
        cast=draw(_mostly("none", CASTS)),
        # autograd refuses writes into what a linear has read, or an activation made, dense or adapted
        write=draw(_mostly("none", ("none",) if gradients else WRITES)),
        branch=draw(_mostly("none", BRANCHES)),
        cache=cache,
        dtype=dtype,
        plan=plan,
        kinds=tuple(draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))),
        router_bits=draw(st.sampled_from(BITS)),
        bits=draw(st.sampled_from(BITS)),
        density=draw(st.sampled_from((0.0, 0.3, 0.7, 1.0))),
        shift=draw(st.booleans()),
        budget=draw(st.sampled_from((0.5, 0.7, 0.9))),
        prefill=prefill,
        dynamic=draw(st.booleans()),
        gradients=gradients,
        strict=draw(st.sampled_from((False, False, True))),
        as_option=prefill != "factors" and draw(st.sampled_from((False, False, True))),
        calls=draw(_shapes((1, 2, 5, 17))),
    )
