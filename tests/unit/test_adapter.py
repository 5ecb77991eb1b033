"""Adapters: valid combinations of tensors, costs, and casts that leave quantised values unchanged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rana_fx.adapter import Adapter
from rana_fx.cost import Cost, Kept
from rana_fx.errors import BadOperand, UnknownMetric
from rana_fx.formats import Matrix, pack

WIDTH, OUT, RANKS = 70, 130, 6


def stored(rows, columns, bits):
    matrix = torch.randn(rows, columns)
    return (matrix.bfloat16(), None) if bits == 16 else pack(matrix, bits)


def rank(router_bits=16, bits=16, *, hybrid=False, **changes):
    router, router_scale = stored(*((WIDTH, RANKS) if hybrid else (RANKS, WIDTH)), router_bits)
    weight, weight_scale = stored(RANKS, OUT, bits)
    masks = {"router_tau": torch.zeros(WIDTH), "router_kept": 20.5} if hybrid else {}
    facts = {
        "name": "a", "kind": "rank", "sites": ("a",), "ranks": RANKS, "kept": 2.5, "tau": torch.zeros(RANKS),
        "dense_flops": 2.0 * WIDTH * OUT, "dense_bytes": 4.0 * WIDTH * OUT,
    }  # fmt: skip
    return Adapter(
        **facts | masks | dict(router=router, router_scale=router_scale, weight=weight, weight_scale=weight_scale) | changes
    )


def row_bytes(columns, bits):
    """Expected bytes of a row: one fp32 scale per row in 8 bits, one per group of 64 in 4 bits."""
    return {16: 2 * columns, 8: columns + 4, 4: columns / 2 + -(-columns // 64) * 4}[bits]


def exact(**changes):
    return {"exact_tau": torch.zeros(OUT), "exact_kept": 31.5} | changes


@given(
    st.sampled_from([16, 8, 4]),
    st.sampled_from([16, 8, 4]),
    st.booleans(),
    st.floats(0, RANKS),
    st.floats(0, WIDTH),
    st.none() | st.floats(0, OUT),
)
def test_costs_are_what_is_read(router_bits, bits, hybrid, kept, inputs, rows):
    adapter = rank(router_bits, bits, hybrid=hybrid, **({} if rows is None else exact()))
    uses = 2  # relative to the dense cost
    if hybrid:
        flops, read = inputs * RANKS, inputs * row_bytes(RANKS, router_bits)
    else:
        flops, read = RANKS * WIDTH, RANKS * row_bytes(WIDTH, router_bits)
    assert adapter.fixed_cost(inputs).flops == pytest.approx(uses * flops)
    assert adapter.fixed_cost(inputs).bytes == pytest.approx(uses * read)
    own = 0 if rows is None else rows * WIDTH  # of the model's weight, in 16 bits
    assert adapter.cost("flops", kept, inputs, rows) == pytest.approx(uses * (flops + kept * OUT + own))
    assert adapter.cost("bytes", kept, inputs, rows) == pytest.approx(uses * (read + kept * row_bytes(OUT, bits) + 2 * own))


@pytest.mark.parametrize("more", [{}, exact()])
@pytest.mark.parametrize("hybrid", [False, True])
def test_costed_and_cost_agree(hybrid, more):
    adapter = rank(8, 4, hybrid=hybrid, **more).costed()
    for metric, said in (("flops", adapter.flops), ("bytes", adapter.bytes)):
        assert (
            adapter.cost(metric) == said == adapter.cost(metric, adapter.kept) == adapter.cost(metric, None, adapter.router_kept)
        )
        assert adapter.cost(metric, None, None, adapter.exact_kept) == said
    # costs given at construction are unchanged
    changed = replace(adapter, bytes=7.0)
    assert changed.cost("bytes") == 7.0
    assert changed.cost() == changed.cost(Kept()) == changed.expected_cost == Cost(adapter.flops, 7.0)


@given(st.floats(0, RANKS), st.floats(0, WIDTH), st.floats(0, OUT))
def test_both_ways_to_ask_for_a_cost_agree(kept, inputs, outputs):
    adapter = rank(8, 4, hybrid=True, **exact())
    found = adapter.cost(Kept(kept, inputs, outputs))
    assert found == adapter.cost(kept=Kept(kept, inputs, outputs))
    assert found == Cost(*(adapter.cost(metric, kept, inputs, outputs) for metric in ("flops", "bytes")))
    assert adapter.cost(Kept(kept)) == adapter.cost(Kept(kept).otherwise(adapter.expected))
    changed = adapter.with_kept(Kept(kept, inputs, outputs))
    assert changed.expected == Kept(kept, inputs, outputs) and changed.expected_cost == found
    assert adapter.with_kept(Kept()).expected == adapter.expected
    with pytest.raises(UnknownMetric):
        adapter.cost("us", kept)


def test_expectations_stay_away_where_nothing_masks():
    changed = rank().with_kept(Kept(1.0, 2.0, 3.0))
    assert changed.expected == Kept(1.0)
    assert (changed.router_mask, changed.exact_mask) == (None, None)
    assert changed.cost(Kept(1.0, 2.0, 3.0)) == changed.expected_cost


def test_masks_and_matrices_are_the_fields():
    made = rank(4, 8, hybrid=True, **exact())
    masks = (made.mask, made.router_mask, made.exact_mask)
    assert all(mask.threshold is value for mask, value in zip(masks, (made.tau, made.router_tau, made.exact_tau), strict=True))
    assert [mask.expected for mask in masks] == [2.5, 20.5, 31.5]
    assert {key: (matrix.shape, matrix.format.name) for key, matrix in made.matrices.items()} == {
        "router": ((WIDTH, RANKS), "int4"), "weight": ((RANKS, OUT), "int8"),
    }  # fmt: skip
    assert isinstance(made.matrix("router"), Matrix) and rank(kind="neuron", router=None).matrix("router") is None
    assert repr(made) == "Adapter('a', rank, 2.5 of 6 kept)"


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_costs_without_a_router(bits):
    weight, scale = stored(WIDTH, OUT, bits)
    made = rank(
        kind="neuron", router=None, router_scale=None, ranks=WIDTH, tau=torch.zeros(WIDTH), weight=weight, weight_scale=scale
    )
    assert made.cost("bytes", 30) == pytest.approx(2 * 30 * row_bytes(OUT, bits))
    assert made.fixed_cost() == Cost()
    own = replace(made, weight=None, weight_scale=None)
    assert own.cost("bytes", 35) == own.dense_bytes / 2
    kept = replace(made, kind="stored", kept=float(WIDTH)).costed()
    assert kept.bytes == pytest.approx(2 * WIDTH * row_bytes(OUT, bits))
    assert kept.flops == kept.dense_flops


def test_what_follows_from_tensors():
    made = rank(4, 8, hybrid=True)
    assert made.bits() == {"router": 4, "weight": 8}
    assert (made.width, made.out) == (WIDTH, OUT)
    assert made.router_density == 20.5 / WIDTH
    assert made.exact_density == 0 and not made.reads_model
    corrected = rank(**exact())
    assert corrected.exact_density == 31.5 / OUT and corrected.reads_model
    assert replace(made, kind="neuron", router=None, router_scale=None, router_tau=None, router_kept=None,
                   weight=None, weight_scale=None).reads_model  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(RANKS, OUT, dtype=torch.float8_e5m2)}, r"a: weight is torch.float8_e5m2: expected floating"),
        ({"weight_scale": torch.ones(5)}, r"a: weight_scale is \(5,\): expected \(6,\) for an int8 weight"),
        ({"router_scale": None}, r"a: router_scale is None: expected \(6,\)"),
        ({"weight": torch.zeros(5, OUT), "weight_scale": None}, r"a: weight is \(5, 130\): expected 6 rows"),
        ({"weight": torch.zeros(RANKS, OUT, dtype=torch.int32)}, r"a: weight is torch.int32"),
        ({"tau": torch.zeros(RANKS, dtype=torch.float64)}, r"a: tau is \(6,\) torch.float64: expected \(6,\) torch.float32"),
        ({"bias": torch.zeros(7)}, r"a: bias is \(7,\) torch.float32: expected \(130,\) floating"),
        ({"bias": torch.zeros(OUT), "shift": torch.zeros(7)}, r"a: shift is \(7,\)"),
        (exact(exact_tau=torch.zeros(7)), r"a: exact_tau is \(7,\) torch.float32: expected \(130,\) torch.float32"),
        (exact(exact_tau=torch.zeros(OUT).half()), r"a: exact_tau is \(130,\) torch.float16: expected \(130,\) torch.float32"),
        ({"router_tau": torch.zeros(WIDTH), "router_kept": 3.0}, r"a: router is \(6, 70\): expected 6 columns, input-major"),
        (
            {"kind": "neuron", "router": None, "weight": None, "weight_scale": None},
            "a: router_scale is a scale: expected None: there is no router",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(changes, message):
    with pytest.raises(BadOperand, match=message):
        rank(8, 8, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": None}, "a router needs a weight"),
        ({"router": None}, "a rank adapter's router"),
        ({"kind": "neuron"}, "a neuron adapter's router"),
        ({"kind": "stored", "router": None, "weight": None}, "a stored adapter has a weight"),
        ({"kind": "gated", "router": None}, "multiplies by the model's own weight"),
        ({"shift": torch.zeros(RANKS)}, "a shift needs a bias"),
        ({"router_kept": 3.0}, "come together"),
        (exact(exact_tau=None), "a: exact_tau and exact_kept come together"),
        (exact(exact_kept=None), "a: exact_tau and exact_kept come together"),
        (exact(kind="stored", router=None), "a: a stored adapter has no outputs to make exact"),
        (exact(sites=("a", "b")), "a: exact outputs are those of one linear"),
        (exact(bias=torch.zeros(OUT), shift=torch.zeros(RANKS)), "a: exact outputs beside a shift"),
        (exact(exact_kept=OUT + 1.0), "a: exact_kept"),
        ({"kept": 7.0}, "a"),
    ],
)
def test_invariants(changes, message):
    with pytest.raises(AssertionError, match=message):
        rank(**changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_casts_leave_stored_numbers_alone(dtype):
    assert rank(**exact()).to(dtype).on("cpu").exact_tau.dtype == torch.float32
    before = rank(8, 4, hybrid=True, bias=torch.randn(OUT), shift=torch.randn(RANKS))
    after = before.to(dtype)
    for key in ("tau", "router", "router_scale", "router_tau", "weight", "weight_scale"):
        assert getattr(after, key).dtype == getattr(before, key).dtype
        assert torch.equal(getattr(after, key), getattr(before, key))
    assert after.bias.dtype == after.shift.dtype == dtype
    plain = rank(16, 16).to(dtype)
    assert plain.router.dtype == plain.weight.dtype == dtype
    scaled = replace(before, weight_scale=before.weight_scale.bfloat16()).to(dtype)
    assert scaled.weight_scale.dtype == torch.bfloat16
