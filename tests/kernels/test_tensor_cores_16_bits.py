"""Weights in 16 bits on tensor cores (kernels/cuda): any layout, weights that are not finite, several weights in one launch.

What they share with weights in 8 and 4 bits: test_tensor_cores.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rana_fx.errors import BadOperand
from rana_fx.kernels import cost, registry
from rana_fx.kernels.cuda import implementations, op
from rana_fx.kernels.cuda import masked_gemv_parts as parts
from rana_fx.kernels.cuda.config import Config, configs, default_config, most_shared_bytes
from rana_fx.kernels.problem import operand_of_tensor, problem_of
from rana_fx.passes import lower
from tests.support import emulated
from tests.support.emulated import product
from tests.support.products import STRIDES, Product, strided

GPU = [pytest.param("cuda", marks=pytest.mark.gpu)]

# thresholds: what drops nothing, some, all but what is not finite
LEVELS = [-1.0, 0.0, float("nan"), 1e-45, 0.5, 2.5, 1e30, float("inf")]


@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.bfloat16), (4, torch.float16), (10, torch.bfloat16)])
@settings(max_examples=15)
@given(data=st.data())
def test_any_layout_and_thresholds_in_16_bits(tokens, dtype, data):
    """What a compilation does not depend on: sizes within a step and a segment, strides, offsets, thresholds of each rank."""
    ranks, columns = data.draw(st.integers(33, 64)), 8 * data.draw(st.integers(1, 20))
    case = product(tokens, ranks, columns, 16, dtype=dtype, seed=data.draw(st.integers(0, 99)))
    tau = torch.tensor(data.draw(st.lists(st.sampled_from(LEVELS), min_size=ranks, max_size=ranks)))
    tau = tau[:1].expand(ranks) if data.draw(st.booleans()) else tau
    before, behind = (8 * data.draw(st.integers(0, 3)) for _ in range(2))
    wide = torch.full((ranks, before + columns + behind), torch.nan, dtype=dtype)
    weight = wide[:, before : before + columns].copy_(case.weight)
    v = strided(case.v, data.draw(STRIDES))
    found = dataclasses.replace(case, v=v, tau=tau.nan_to_num(nan=0.0, posinf=torch.inf), weight=weight)
    y = emulated.masked_gemv(v, tau, weight, case.bias, None, config=Config(1, 2, 2, 2))
    found.check(y)
    assert torch.equal(y, emulated.masked_gemv(v, tau, weight, case.bias, None, config=Config(1, 2, 2, 2), early=True))


@pytest.mark.parametrize("tokens", [1, 3])
def test_weights_that_are_not_finite_count_where_a_token_keeps_their_rank(tokens):
    """As in the dense product of the masked input; and a list that ends within a step is filled up with rank 0, which is not
    multiplied."""
    case = product(tokens, 64, 72, 16, bias=False)
    tau, weight = torch.full((64,), 0.0), case.weight.clone()
    tau[0], tau[20:] = torch.inf, torch.inf  # nobody keeps these
    weight[0], weight[21], weight[20] = torch.inf, torch.nan, -torch.inf
    weight[1, 5], weight[2, 6], weight[3, 7:9] = torch.inf, torch.nan, -torch.inf
    weight[4, 8] = torch.inf
    v = case.v.abs()
    v[-1, 1] = 0.0
    for early in (False, True):
        y = emulated.masked_gemv(v, tau, weight, config=Config(1, 2, 2, 2), early=early)
        exact = v[:, 1:20].double() @ weight[1:20].double()
        for what in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(what(y), what(exact))
        finite = dataclasses.replace(case, v=v, tau=tau, weight=weight.nan_to_num(0.0, 0.0, 0.0))
        finite = dataclasses.replace(finite, weight=torch.where(exact.isfinite().all(0), finite.weight, 0.0))
        finite.check(torch.where(exact.isfinite().all(0), y, 0.0))
        assert exact.isfinite().all(0).sum() == 72 - 4


@pytest.mark.parametrize(("ranks", "columns"), [(4096, 12288), (4096, 4096), (4096, 22016), (11008, 4096), (28672, 8192)])
def test_default_configs_have_a_block_on_most_multiprocessors_and_short_lists(ranks, columns):
    """Blocks have 8 warps at most and copy 48 KiB ahead; lists are short, or clusters as large as they can be."""
    for tokens in (1, 4, 16):
        first, *others = configs(ranks, columns, tokens, bits=16)
        assert first == default_config(ranks, columns, tokens, bits=16) and first not in others
        assert all(most_shared_bytes(one, ranks, tokens, 16) <= 227 * 1024 for one in (first, *others))
        longest = max(64, first.listed_by_thread(ranks, tokens))
        assert all(one.listed_by_thread(ranks, tokens) <= longest for one in others)
        assert first.listed_by_thread(ranks, tokens) <= 64 or first.splits == 8
        assert first.blocks(columns, 16, gated=False) >= 0.75 * 132 and first.threads() <= 256
        assert first.segments * first.warps * (first.stages - 1) * 16 * 128 <= 48 * 1024


@pytest.mark.parametrize("columns", [64, 256, 1024, 2048])
def test_narrow_results_have_narrow_blocks(columns):
    found = default_config(2048, columns, bits=16)
    assert found.splits == 8 and found.segments <= max(columns // 64, 1)
    assert found.blocks(columns, 16, gated=False) >= min(0.75 * 132, 8 * columns // 64)


# ---- several weights of one tensor


def several(tokens, ranks, sizes, *, dtype=torch.bfloat16, bias=True, levels=(0.3, 8.0, 0.0), device="cpu"):
    """A product for each weight, of the same v; the first of them has rows apart."""
    found = []
    for index, size in enumerate(sizes):
        case = product(tokens, ranks, size, 16, dtype=dtype, threshold=levels[index], seed=index, bias=bias)
        weight = torch.cat([case.weight, case.weight], 1)[:, :size] if index == 0 else case.weight
        found.append(dataclasses.replace(case, v=found[0].v if found else case.v, weight=weight).to(torch.device(device)))
    return found


def operands_of(cases):
    biases = [case.bias for case in cases if case.bias is not None]
    return cases[0].v, [case.tau for case in cases], [case.weight for case in cases], biases


def check_each(cases, y):
    for case, part in zip(cases, y.split([case.weight.shape[1] for case in cases], -1), strict=True):
        case.check(part)


@pytest.mark.parametrize(
    ("tokens", "sizes", "config", "facts"),
    [
        (1, [64, 136, 200], Config(2, 1, 2, 3), dict(levels=(0.3, 8.0, 0.0))),
        (3, [72, 8], Config(1, 2, 1, 2), dict(dtype=torch.float16, bias=False, levels=(0.0, 0.3))),
        (9, [64, 64, 64], Config(1, 1, 2, 2), dict(levels=(1e30, 0.3, 1e30))),
    ],
)
def test_each_weight_has_its_own_thresholds_and_results(tokens, sizes, config, facts):
    """Sizes that end within a block, and one that fills it. An early launch copies rows of the weight without thresholds, and
    waits before it lists the others'."""
    cases = several(tokens, 90, sizes, **facts)
    y = emulated.masked_gemv_parts(*operands_of(cases), config=config)
    check_each(cases, y)
    assert torch.equal(y, emulated.masked_gemv_parts(*operands_of(cases), config=config, early=True))
    one = Product(*cases[-1].operands[:3], None, cases[-1].bias)
    assert torch.equal(y[:, -sizes[-1] :], emulated.masked_gemv(*one.operands, config=config))


def test_thresholds_and_biases_of_several_dtypes():
    cases = several(1, 32, [64, 64])
    cases[0] = dataclasses.replace(cases[0], bias=cases[0].bias.bfloat16(), tau=cases[0].tau.bfloat16())
    check_each(cases, emulated.masked_gemv_parts(*operands_of(cases), config=Config(1, 1, 1, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(v=torch.ones(1, 32)), "reads weights in torch.float32 only"),
        (dict(weights=[torch.ones(32, 64).bfloat16(), torch.ones(32, 68).bfloat16()]), "rows of 68 columns, 136 bytes apart"),
        (dict(weights=[torch.ones(32, 64).bfloat16()], taus=[torch.ones(32)]), "1 with 1 thresholds and 0 biases"),
        (dict(taus=[torch.ones(32), torch.ones(31)]), r"taus\[1\]"),
        (dict(v=torch.ones(17, 32).bfloat16()), "17"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    given = dict(v=torch.ones(1, 32).bfloat16(), taus=[torch.ones(32)] * 2, weights=[torch.ones(32, 64).bfloat16()] * 2) | change
    with pytest.raises(BadOperand, match=message):
        emulated.masked_gemv_parts(given["v"], given["taus"], given["weights"])


@pytest.mark.parametrize(
    ("widths", "stride", "facts", "reason"),
    [
        ([64, 64], 64, {}, None),
        ([64, 72, 8], 80, {}, None),
        ([60, 68], 72, {}, "not made of aligned 16 bytes"),  # together they are, and rows begin where they should
        ([64, 64], 68, {}, "not made of aligned 16 bytes"),
        ([64] * 4, 64, {}, "4 weights, it takes 2 to 3"),
        ([64, 64], 64, dict(dtype=torch.float16), "not all of the dtype of the activations"),
        ([64, 64], 64, dict(alike=False), "not all of the dtype of the activations"),
        ([64, 64], 64, dict(tokens=17), "17 tokens, it takes 1 to 16"),
        ([64, 64], 64, dict(compiled=True), "launched from Python"),
    ],
)
def test_which_parts_are_accepted_and_why_others_are_not(monkeypatch, widths, stride, facts, reason):
    monkeypatch.setattr(implementations, "_device", lambda device: None)
    monkeypatch.setattr(cost, "nearest", lambda device: cost.H200)
    weights = [torch.ones(32, stride).bfloat16()[:, :width] for width in widths]
    arguments = dict(v=torch.ones(1, 32).bfloat16(), taus=[], weights=weights, biases=[], density=0.5)
    problem = problem_of("masked_gemv_parts", arguments, operand_of_tensor, compiled=False)
    problem = dataclasses.replace(problem, device=torch.device("cuda"), **facts)
    chosen = registry.choose(problem)
    assert (chosen.name == implementations.NAME) == (reason is None)
    assert reason is None or any(row.name == implementations.NAME and reason in text for row, text in registry.why(problem))


@pytest.mark.parametrize("device", GPU, indirect=True)
@settings(max_examples=15)
@given(data=st.data())
def test_launches_of_several_weights_match_fp64(device, data):
    sizes = data.draw(st.lists(st.sampled_from([8, 64, 136, 1024]), min_size=2, max_size=3))
    facts = dict(dtype=data.draw(st.sampled_from([torch.bfloat16, torch.float16])), bias=data.draw(st.booleans()), device=device)
    cases = several(data.draw(st.integers(1, 16)), data.draw(st.sampled_from([1, 97, 512, 4100])), sizes, **facts)
    config = data.draw(st.sampled_from([None, Config(1, 8, 4, 4), Config(4, 2, 3, 3), Config(2, 2, 8, 2)]))
    y = parts.masked_gemv_parts(*operands_of(cases), config=config)
    check_each(cases, y)
    for early in (False, True):
        assert torch.equal(y, parts.masked_gemv_parts(*operands_of(cases), config=config, early=early))


@pytest.mark.parametrize("device", GPU, indirect=True)
def test_opcheck_of_parts(device):
    fields = list(dataclasses.astuple(default_config(64, 200, 2, bits=16)))
    for bias in (False, True):
        cases = several(2, 64, [64, 136], bias=bias, device=device)
        torch.library.opcheck(op.masked_gemv_parts_tensor_cores, (*operands_of(cases), fields, False))


@pytest.mark.parametrize("device", GPU, indirect=True)
def test_compiled_graphs_launch_parts(device):
    """In a CUDA graph; the result is the eager launch's to the bit."""
    cases = several(1, 4096, [4096, 4096, 4096], bias=False, device=device)
    _, taus, weights, _ = operands_of(cases)

    def step(v):
        return torch.ops.rana.masked_gemv_parts(v, taus, weights, [], 0.5) + 1

    lower.register()
    wanted = parts.masked_gemv_parts(cases[0].v, taus, weights) + 1
    compiled = torch.compile(step, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(compiled(cases[0].v), wanted)
