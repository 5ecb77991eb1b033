"""rana::masked_gemv in every storage: numerics by each implementation, gradients, and what templates and launches are specific
about. Fused forms: test_masked_gemv_fused.py; several weights in one launch: test_masked_gemv_parts.py."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rana_fx.errors import BadOperand
from rana_fx.formats import pack, unpack
from rana_fx.kernels import reference
from rana_fx.kernels.cpp.template import MAX_TOKENS
from rana_fx.kernels.ops import implementation, masked_gemv
from rana_fx.kernels.triton.config import Config
from rana_fx.passes import lower
from tests.support.implementations import AT_ONCE, EVERY, FEW, GEMV_CONFIGS, computed, kernels, runs_again
from tests.support.inductor import FALLBACK, GEMV, calls, check_threads_change_no_bit, compiled, each, poisoned
from tests.support.products import Product, assert_close, product_of, products

STORED = (16, 8, 4)
BITS = pytest.mark.parametrize("bits", STORED)
TOKENS = {"reference": (1, 2, 5), "cpp": (1, 2, 3, MAX_TOKENS), "triton": (1, 2, 3, 4, 5, 16)}


# ---- every implementation


def by_reference(cases, device, data):
    """With one more dimension."""
    with implementation("reference"):
        for case in cases:
            y = masked_gemv(case.v[None], case.tau, case.weight, case.bias, case.scale)
            assert y.shape == (1, len(case.v), y.shape[-1])
            case.check_each(y[0])


def by_cpp(cases, device, data):
    """A floating weight with rows that are not contiguous is multiplied by a dense matmul."""
    with poisoned():
        results, code = each(masked_gemv, [case.operands for case in cases])
    assert FALLBACK not in code
    # of one element or one row, either stride is that of contiguous rows
    assert calls(code, GEMV) == sum(case.scale is not None or case.weight.stride(1) == 1 for case in cases)
    for case, y in zip(cases, results, strict=True):
        case.check(y)


def by_triton(cases, device, data):
    """In any config."""
    launch = kernels("masked_gemv", device).masked_gemv
    for case in cases:
        config = data.draw(GEMV_CONFIGS)
        y = launch(*case.operands, config=config)
        case.check(y)
        if runs_again(case, cases, device):
            assert torch.equal(y, launch(*case.operands, config=config))


@EVERY
@FEW
@given(data=st.data())
def test_matches_fp64(who, device, data):
    """In every storage."""
    cases = [data.draw(products(bits=bits, tokens=TOKENS[who])).to(device) for bits in STORED for _ in range(AT_ONCE[who])]
    {"reference": by_reference, "cpp": by_cpp, "triton": by_triton}[who](cases, device, data)


@EVERY
def test_a_value_at_its_threshold_is_kept(who, device):
    """Squares of small integers are exact in every dtype."""
    v, tau, kept = torch.tensor([[2.0, -3.0, 2.0, 1.0]]), torch.tensor([4.0, 9.0, 5.0, 0.5]), [True, True, False, True]
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    operands = [(v.to(device, dtype), tau.to(device), torch.eye(4, dtype=dtype, device=device)) for dtype in dtypes]
    for got, (given_v, given_tau, _) in zip(computed(who, masked_gemv, operands, GEMV, device), operands, strict=True):
        assert torch.equal(got.cpu(), torch.where(torch.tensor(kept), given_v.cpu(), 0.0))
        assert reference.kept(given_v, given_tau).tolist() == [kept]


@EVERY
def test_half_precision_squares_do_not_overflow(who, device):
    v = torch.tensor([[300.0, 1e-4]], dtype=torch.float16, device=device)  # 300^2 overflows fp16, (1e-4)^2 vanishes in it
    tau = torch.tensor([80_000.0, 5e-9], device=device)
    assert reference.kept(v, tau).tolist() == [[True, True]]
    (y,) = computed(who, masked_gemv, [(v, tau, torch.eye(2, dtype=torch.float16, device=device))], GEMV, device)
    assert torch.equal(y, v)


# ---- declaration and gradients


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed):
    weight = torch.randn(5, 7, requires_grad=True)
    if transposed:
        weight = torch.randn(7, 5).t().requires_grad_()
    v = torch.randn(2, 3, 5, requires_grad=True)
    torch.library.opcheck(masked_gemv, (v, torch.full((5,), 0.3), weight, torch.randn(7, requires_grad=True)))


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    v = torch.where((v.square() - 0.3).abs() < 0.05, v + 0.3, v).requires_grad_()  # away from the threshold
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    tau = torch.full((5,), 0.3)
    assert torch.autograd.gradcheck(lambda *a: masked_gemv(a[0], tau, a[1], a[2]), (v, weight, bias))


def test_a_value_at_its_threshold_has_a_gradient():
    v = torch.tensor([[2.0, -3.0, 2.0, 1.0]], requires_grad=True)
    masked_gemv(v, torch.tensor([4.0, 9.0, 5.0, 0.5]), torch.eye(4)).sum().backward()
    assert (v.grad != 0).tolist() == [[True, True, False, True]]


def test_wrong_shapes_are_refused_under_tracing():
    with torch._subclasses.FakeTensorMode(), pytest.raises(RuntimeError, match="expected"):
        masked_gemv(torch.empty(2, 4), torch.empty(4), torch.empty(5, 3))


# ---- C++: graphs, threads, and cases that are declined


@settings(max_examples=2)
@given(data=st.data())
def test_matches_fp64_in_several_blocks(data):
    def case(bits):
        choices = ([1, 5, MAX_TOKENS], [7, 97, 251], [514, 1030, 4500], [torch.float32, torch.bfloat16])
        density, seed = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), data.draw(st.integers(0, 99))
        return product_of(*(data.draw(st.sampled_from(choice)) for choice in choices), bits=bits, density=density, seed=seed)

    cases = [case(bits) for bits in STORED for _ in range(3)]
    with poisoned():
        results, code = each(masked_gemv, [one.operands for one in cases])
    assert calls(code, GEMV) == len(cases)
    for one, got in zip(cases, results, strict=True):
        one.check(got)


def test_threads_change_no_bit():
    """2,000 and 500 columns are not a multiple of the grain size or of the columns per thread; of 500, ranks are in two parts."""
    cases = [product_of(3, 250, 2000, torch.float32, bits=bits) for bits in STORED]
    cases += [product_of(1, 330, 500, torch.float32, bits=bits) for bits in STORED]
    results = check_threads_change_no_bit(masked_gemv, [case.operands for case in cases], GEMV)
    for case, y in zip(cases, results, strict=True):
        case.check(y)


def test_parts_of_a_weight_in_the_graph():
    """A view inside the graph has an offset of its own, and two views may be parts of one buffer."""
    cases = [product_of(1, 61, 256, torch.float32, bits=bits) for bits in STORED]
    floating = cases[0]

    def rows(v, tau, weight, bias, scale):
        first, second = (None, None) if scale is None else (scale[10:41], scale[:31])
        y = masked_gemv(v[:, 10:41], tau[10:41], weight[10:41], bias, first)
        return y, masked_gemv(v[:, :31], tau[:31], weight[:31], bias, second)

    def columns(v, tau, weight):
        return masked_gemv(v, tau, torch.narrow(weight, 1, 64, 100)), masked_gemv(v, tau, weight[:, :64])

    def one_buffer(weight):
        return masked_gemv(weight[:1, 3:64], weight[1, :61].abs(), weight)

    def function(*flat):
        of_each = [flat[i : i + 5] for i in range(0, len(flat), 5)]
        v, tau, weight, *_ = of_each[0]
        return *(y for one in of_each for y in rows(*one)), *columns(v, tau, weight), one_buffer(weight)

    expected = [
        Product(one.v[:, i], one.tau[i], one.weight[i], None if one.scale is None else one.scale[i], one.bias)
        for one in cases
        for i in (slice(10, 41), slice(31))
    ]
    v, tau, weight = floating.v, floating.tau, floating.weight
    expected += [Product(v, tau, part, None, None) for part in (weight[:, 64:164], weight[:, :64])]
    expected.append(Product(weight[:1, 3:64], weight[1, :61].abs(), weight, None, None))
    got, code = compiled(function, *(value for one in cases for value in one.operands))
    assert calls(code, GEMV) == len(expected)
    for y, product in zip(got, expected, strict=True):
        product.check(y)


def test_steps_aside():
    """More tokens, a dynamic number of tokens, or a weight whose rows are not contiguous, give a dense matmul."""
    many = product_of(MAX_TOKENS + 1, 31, 64, torch.float32)
    turned = dataclasses.replace(many, v=many.v[:1], weight=many.weight.t().contiguous().t())
    results, code = each(masked_gemv, [many.operands, turned.operands])
    assert GEMV not in code
    for case, got in zip((many, turned), results, strict=True):
        case.check(got)
    three = dataclasses.replace(many, v=many.v[:3])
    got, code = compiled(masked_gemv, *three.operands, dynamic=True)
    assert GEMV not in code
    three.check(got)


def test_gradients_through_the_template():
    v, tau, weight, bias, _ = product_of(2, 31, 64, torch.float32).operands
    leaves = [x.clone().requires_grad_() for x in (v, weight, bias)]
    got, code = compiled(lambda a, w, b: masked_gemv(a, tau, w, b).square().sum(), *leaves)
    assert GEMV in code
    got.backward()
    right = [x.double().requires_grad_() for x in (v, weight, bias)]
    kept = v.square() >= tau
    ((right[0] * kept) @ right[1] + right[2]).square().sum().backward()
    for a, b in zip(leaves, right, strict=True):
        assert_close("grad", a.grad, b.grad, b.grad.abs() + 1, terms=31 * 64)


def test_weights_of_symbolic_size_are_left_to_a_matrix_product():
    lower.register()
    v, tau, weight = torch.randn(2, 12), torch.full((12,), 0.3), torch.randn(12, 7)
    compiled = torch.compile(lambda v, tau, weight: masked_gemv(v, tau, weight), dynamic=True)
    expected = reference.masked_gemv(v.double(), tau, weight.double())
    # fp32 sums of 12 terms
    torch.testing.assert_close(compiled(v, tau, weight).double(), expected, rtol=1e-5, atol=1e-5)


# ---- Triton: defaults, counters, slices, and operands that are refused


@pytest.fixture
def launch(device):
    return kernels("masked_gemv", device).masked_gemv


@pytest.fixture
def splitk(device):
    return kernels("splitk", device)


@BITS
def test_default_config(launch, device, bits):
    generator = torch.Generator().manual_seed(bits)
    weight, scale = torch.randn(97, 66, generator=generator), None
    if bits < 16:
        weight, scale = pack(weight, bits)
    v = torch.randn(2, 1, 97, generator=generator)
    case = Product(v, torch.full((97,), 0.5), weight, scale, None).to(device)
    case.check(launch(*case.operands))


@BITS
def test_counters_are_left_at_zero(launch, device, bits):
    weight = torch.randn(40, 256, device=device)
    weight, scale = pack(weight, bits) if bits < 16 else (weight, None)
    counters = torch.zeros(99, dtype=torch.int32, device=device)
    for tokens in (1, 7):
        v, config = torch.randn(tokens, 40, device=device), Config(3, block_n=64)
        y = launch(v, torch.zeros(40, device=device), weight, None, scale, config=config, counters=counters)
        torch.testing.assert_close(y, v @ unpack(weight, scale), rtol=1e-4, atol=1e-4)
        assert not counters.any()


def test_overlapping_launches_get_different_counters(splitk, device):
    first, second = splitk.counters_for(device, 5), splitk.counters_for(device, 40)
    assert first.shape == (5,)
    assert second.data_ptr() == first.data_ptr() + 32 * 4
    for _ in range(splitk.RING // 64 + 1):
        assert not splitk.counters_for(device, 40).any()
    assert splitk.counters_for(device, splitk.RING + 1).shape == (splitk.RING + 1,)


def test_counters_are_made_by_a_thread_of_their_own(splitk, device, monkeypatch):
    """What the calling thread allocates may belong to a CUDA graph that is being warmed up, and they outlive it."""
    made, zeros = [], torch.zeros

    def recorded(*args, **kwargs):
        made.append(threading.get_ident())
        return zeros(*args, **kwargs)

    monkeypatch.setattr(splitk, "_rings", {})
    monkeypatch.setattr(splitk, "_next", {})
    monkeypatch.setattr(torch, "zeros", recorded)
    first, second = splitk.counters_for(device, 5), splitk.counters_for(device, 5)
    assert first.data_ptr() != second.data_ptr()
    assert len(made) == 1 and made[0] != threading.get_ident()


def test_slices_without_ranks_add_nothing(launch, device):
    v, tau, weight = (torch.ones(shape, device=device) for shape in ((1, 3), (3,), (3, 5)))
    y = launch(v, tau, weight, config=Config(splits=5))
    assert torch.equal(y, torch.full_like(y, 3.0))


def test_many_ranks(launch, device):
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(1, 65_536, generator=generator)
    case = Product(v, torch.full((65_536,), 9.0), torch.randn(65_536, 3, generator=generator), None, None).to(device)
    case.check(launch(case.v, case.tau, case.weight))


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        (((1, 4), (4,), (5, 3)), "v"),
        (((1, 5), (4,), (5, 3)), "tau"),
        (((17, 5), (5,), (5, 3)), "v"),
        (((1, 5), (5,), (5,)), "weight"),
    ],
)
def test_wrong_operands_are_refused(launch, device, shapes, name):
    v, tau, weight = (torch.ones(shape, device=device) for shape in shapes)
    with pytest.raises(BadOperand) as error:
        launch(v, tau, weight)
    assert error.value.facts["name"] == name
