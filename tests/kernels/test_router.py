"""rana::router and rana::normed_router in every storage: numerics by each implementation, and what the template and the launch
are specific about."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rana_fx.errors import BadOperand
from rana_fx.formats import pack, unpack
from rana_fx.kernels.cpp.template import MAX_TOKENS
from rana_fx.kernels.ops import implementation, masked_gemv, normed_router, router
from tests.support.implementations import AT_ONCE, EAGER, EVERY, FEW, kernels, runs_again
from tests.support.inductor import FALLBACK, GEMV, ROUTER, calls, check_threads_change_no_bit, each, poisoned
from tests.support.products import DTYPES, SIZES, STRIDES, Product, assert_close, assert_each_close, moved, strided

STORED = (16, 8, 4)
BITS = pytest.mark.parametrize("bits", STORED)
TOKENS = {"reference": (1, 2, 5), "cpp": (1, 2, 5, MAX_TOKENS), "triton": (1, 2, 3, 4, 5, 16)}
CONFIGS = st.fixed_dictionaries(
    {
        "block_r": st.sampled_from([4, 16]),
        "block_d": st.sampled_from([64, 128]),
        "warps": st.just(4),
        "stages": st.sampled_from([1, 3]),
    }
)


def operands(tokens, rows, width, dtype, bits, *, group=64, seed=0):
    """x, weight as stored, its scale."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = (torch.randn(rows, width, generator=generator) / width**0.5).to(dtype)
    return (x, weight, None) if bits == 16 else (x, *pack(weight, bits, group))


@st.composite
def drawn(draw, who, bits, device):
    """``operands`` of any strides, on the device."""
    wide = who == "cpp"
    rows, widths = [*SIZES, 530] if wide else SIZES, [*SIZES, 514] if wide else SIZES
    width = draw(st.sampled_from([size for size in widths if bits != 4 or size % 2 == 0]))
    shape = draw(st.sampled_from(TOKENS[who])), draw(st.sampled_from(rows)), width
    dtype, group, seed = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([64, 128])), draw(st.integers(0, 2**16))
    x, weight, scale = operands(*shape, dtype, bits, group=group, seed=seed)
    x, weight = strided(x, draw(STRIDES)), strided(weight, draw(STRIDES))
    if scale is not None and scale.dim() == 2:
        scale = strided(scale, draw(STRIDES))
    return tuple(value if value is None else moved(value, device) for value in (x, weight, scale))


def sums(x, weight, scale):
    """The product and the sum of the magnitudes of its terms, fp64."""
    w = unpack(weight, scale, torch.float64)
    return x.double() @ w.t(), x.double().abs() @ w.t().abs()


def check(z, x, weight, scale, compare=assert_close):
    assert z.dtype == x.dtype
    compare("z", z, *sums(x, weight, scale), terms=x.shape[-1])


# ---- every implementation


def by_reference(cases, device, data):
    """With one more dimension; sums and dequantised weights are in x's dtype."""
    with implementation("reference"):
        for x, *stored in cases:
            check(router(x[None], *stored)[0], x, *stored, compare=assert_each_close)


def by_cpp(cases, device, data):
    """A floating weight with rows that are not contiguous is multiplied by a dense matmul."""
    with poisoned():
        results, code = each(router, cases)
    assert FALLBACK not in code
    assert calls(code, ROUTER) == sum(scale is not None or weight.stride(1) == 1 for _, weight, scale in cases)
    for z, case in zip(results, cases, strict=True):
        check(z, *case)


def by_triton(cases, device, data):
    """In any config."""
    module = kernels("router", device)
    for case in cases:
        config = module.RouterConfig(**data.draw(CONFIGS))
        z = module.router(*case, config=config)
        check(z, *case)
        if runs_again(case, cases, device):
            assert torch.equal(z, module.router(*case, config=config))


@EVERY
@FEW
@given(data=st.data())
def test_matches_fp64(who, device, data):
    """In every storage."""
    cases = [data.draw(drawn(who, bits, device)) for bits in STORED for _ in range(AT_ONCE[who])]
    {"reference": by_reference, "cpp": by_cpp, "triton": by_triton}[who](cases, device, data)


# ---- a norm in front: the reference and Triton's kernel


@BITS
@EAGER
@FEW
@given(data=st.data())
def test_norm_in_front(who, device, bits, data):
    for _ in range(6):
        x, weight, scale = data.draw(drawn(who, bits, device))
        eps, offset = data.draw(st.sampled_from([1e-6, 1e-5, 0.5])), data.draw(st.sampled_from([0.0, 1.0]))
        size, step = x.shape[1], data.draw(st.sampled_from([1, 2]))
        gain = torch.randn(size * step, generator=torch.Generator().manual_seed(1)).to(device, x.dtype)[::step]
        gain = data.draw(st.sampled_from([gain, gain.float(), None]))
        if who == "triton":
            module = kernels("router", device)
            config = module.RouterConfig(**data.draw(CONFIGS), ahead=data.draw(st.sampled_from([0, 1, 4])))
            z = module.router(x, weight, scale, gain=gain, eps=eps, offset=offset, config=config)
        else:
            with implementation(who):
                z = normed_router(x, gain, weight, scale, eps, offset)
        normed = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
        normed = normed if gain is None else normed * (gain.double() + offset)
        exact, magnitude = sums(normed, weight, scale)
        assert z.dtype == x.dtype
        # the sum of squares errs as the product does
        assert_close("z", z, exact, 2 * magnitude, terms=size)


@EAGER
def test_eps_counts_where_the_input_is_small(who, device):
    if who == "triton":
        kernels("router", device)
    h = torch.full((1, 16), 1e-3, device=device)  # its mean square is 1e-6
    with implementation(who):
        got = normed_router(h, None, torch.eye(16, device=device), None, 3e-6, 0.0)
    torch.testing.assert_close(got, torch.full_like(h, 0.5), rtol=1e-5, atol=0)


# ---- C++: threads, fusions, and cases that are declined


def test_threads_change_no_bit():
    cases = [operands(3, 1001, 250, torch.float32, bits) for bits in (8, 4)]
    for z, case in zip(check_threads_change_no_bit(router, cases, ROUTER), cases, strict=True):
        check(z, *case)


def test_cast_and_users_are_in_the_same_kernel():
    cases = [operands(1, 61, 128, torch.bfloat16, bits) for bits in (8, 4)]
    with poisoned():
        results, code = each(lambda *args: torch.relu(router(*args)), cases)
    assert code.count(ROUTER) == code.count('extern "C"') == len(cases)
    for got, (x, weight, scale) in zip(results, cases, strict=True):
        right = x.double() @ unpack(weight, scale, torch.float64).t()
        assert_close("z", got, right.relu(), x.double().abs() @ unpack(weight, scale, torch.float64).t().abs(), terms=128)


def test_a_whole_adapter_reads_stored_numbers_alone():
    """Quantised router and matmul in one graph: two kernels and no fallback."""
    cases = []
    for bits in (8, 4):
        x, weight, scale = operands(2, 61, 128, torch.float32, bits)
        cases.append((x[None], weight, scale, torch.full((61,), 0.3), *pack(torch.randn(61, 64) / 8, bits)))
    results, code = each(lambda *a: (z := router(*a[:3]), masked_gemv(z, *a[3:5], None, a[5])), cases)
    assert (code.count(ROUTER), code.count(GEMV), code.count(FALLBACK)) == (2, 2, 0)
    for (x, weight, scale, tau, down, down_scale), (z, got) in zip(cases, results, strict=True):
        check(z[0], x[0], weight, scale)
        Product(z, tau, down, down_scale, None).check(got)


def test_more_tokens_are_a_matrix_product():
    cases = [operands(MAX_TOKENS + 1, 31, 64, torch.float32, bits) for bits in (16, 8, 4)]
    results, code = each(router, cases)
    assert ROUTER not in code
    for got, case in zip(results, cases, strict=True):
        check(got, *case)


# ---- Triton: defaults, and operands that are refused


@pytest.fixture
def launch(device):
    return kernels("router", device).router


def test_norm_of_zeros_is_zero(launch, device):
    z = launch(torch.zeros(2, 8, device=device), torch.ones(3, 8, device=device), eps=1e-6)
    assert torch.equal(z, torch.zeros(2, 3, device=device))


def test_wrong_gain_is_refused(launch, device):
    x, weight = torch.ones(1, 5, device=device), torch.ones(3, 5, device=device)
    with pytest.raises(BadOperand, match="gain"):
        launch(x, weight, gain=torch.ones(4, device=device), eps=1e-6)
    with pytest.raises(BadOperand, match="an eps"):
        launch(x, weight, gain=torch.ones(5, device=device))


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_default_config(launch, device, tokens):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(device) for shape in ((tokens, 97), (31, 97)))
    exact = x.double() @ weight.double().t()
    assert_close("z", launch(x, weight), exact, x.double().abs() @ weight.double().abs().t(), terms=97)


@pytest.mark.parametrize("shapes", [((1, 4), (3, 5)), ((17, 5), (3, 5))])
def test_wrong_operands_are_refused(launch, device, shapes):
    with pytest.raises(BadOperand) as error:
        launch(*(torch.ones(shape, device=device) for shape in shapes))
    assert error.value.facts["name"] == "x"
