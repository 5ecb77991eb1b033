"""The declared ops beyond floating weights: quantised storage, the router, implementations, gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from rana_fx.errors import BadOperand, UnknownChoice
from rana_fx.formats import pack, unpack
from rana_fx.kernels import reference
from rana_fx.kernels.ops import (
    implementation,
    masked_gemv,
    masked_gemv_add,
    masked_gemv_gated,
    masked_gemv_normed,
    masked_gemv_parts,
    masked_rows,
    normed_router,
    router,
)
from tests.support.products import Product, Rows, kernels_run_on, masked_by


def stored(rows, columns, bits):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits))
    return (weight, None) if bits == 16 else pack(weight, bits)


BITS = pytest.mark.parametrize("bits", [16, 8, 4])


@BITS
@pytest.mark.parametrize("lead", [(), (3,), (2, 5)])
def test_opcheck_masked_gemv(bits, lead):
    weight, scale = stored(6, 8, bits)
    v = torch.randn(*lead, 6).requires_grad_()
    bias = torch.randn(8).requires_grad_()
    if bits == 16:
        weight.requires_grad_()
    torch.library.opcheck(masked_gemv, (v, torch.full((6,), 0.3), weight, bias, scale))


@BITS
@pytest.mark.parametrize("kind", ["plain", "transposed", "sliced"])
def test_opcheck_router(bits, kind):
    weight, scale = stored(7, 6, bits)
    x = {
        "plain": torch.randn(2, 3, 6),
        "transposed": torch.randn(6, 3, 2).permute(2, 1, 0),
        "sliced": torch.randn(2, 3, 9)[..., 3:],
    }
    if bits == 16:
        weight.requires_grad_()
    torch.library.opcheck(router, (x[kind].requires_grad_(), weight, scale))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [((), ()), ((3,), (3,)), ((10,), (2, 5))])
@pytest.mark.parametrize("kind", ["plain", "transposed"])
def test_opcheck_masked_rows(bias, lead, kind):
    x, a = torch.randn(*lead[0], 6), torch.randn(*lead[1], 8)
    weight = torch.randn(8, 6) if kind == "plain" else torch.randn(6, 8).t()
    given = x, torch.where(a.abs() > 0.5, a, 0.0), weight, torch.randn(8) if bias else None
    torch.library.opcheck(masked_rows, tuple(None if one is None else one.detach().requires_grad_() for one in given))
    up = torch.nn.functional.linear(x, weight, given[3]).view(a.shape)
    torch.testing.assert_close(masked_rows(*given), given[1] * up)


@BITS
@pytest.mark.parametrize("lead", [(), (3,), (2, 5)])
def test_opcheck_masked_gemv_add(bits, lead):
    weight, scale = stored(6, 8, bits)
    residual = torch.randn(*lead[::-1], 8).permute(*reversed(range(len(lead))), -1)
    operands = torch.randn(*lead, 6), torch.full((6,), 0.3), weight, torch.randn(8), scale, 0.5
    torch.library.opcheck(masked_gemv_add, (*operands, residual))
    torch.testing.assert_close(masked_gemv_add(*operands, residual), masked_gemv(*operands) + residual)


LEADS = [(), (3,), (2, 5)]
# the activation, a string to the op, changes no shape: each is checked with some of the storages and shapes, and computed in all
GATED = [(*one, name) for one, name in zip(itertools.product((16, 8, 4), LEADS), itertools.cycle(reference.ACTIVATIONS))]


@pytest.mark.parametrize(("bits", "lead", "checked"), GATED)
def test_opcheck_masked_gemv_gated(bits, lead, checked):
    weight, scale = stored(6, 256, bits)
    operands = torch.randn(*lead, 6), torch.full((6,), 0.3), weight, torch.randn(256), scale, 0.5
    torch.library.opcheck(masked_gemv_gated, (*operands, checked))
    first, second = masked_gemv(*operands).chunk(2, -1)
    for name, activation in reference.ACTIVATIONS.items():
        torch.testing.assert_close(masked_gemv_gated(*operands, name), activation(first) * second)


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_masked_gemv_parts(bias):
    v, taus, weights = torch.randn(2, 3, 12), [torch.zeros(12), torch.full((12,), 0.5)], [torch.randn(12, 8), torch.randn(12, 5)]
    biases = [torch.randn(8), torch.randn(5)] if bias else []
    torch.library.opcheck(masked_gemv_parts, (v, taus, weights, biases, 0.5))
    apart = [masked_gemv(v, tau, weight, *biases[i : i + 1]) for i, (tau, weight) in enumerate(zip(taus, weights, strict=True))]
    torch.testing.assert_close(masked_gemv_parts(v, taus, weights, biases, 0.5), torch.cat(apart, -1))


@BITS
@pytest.mark.parametrize("gain", [None, torch.linspace(-1, 1, 6)])
@pytest.mark.parametrize("kind", ["plain", "transposed", "sliced"])
def test_opcheck_normed_router(bits, gain, kind):
    weight, scale = stored(7, 6, bits)
    x = {
        "plain": torch.randn(2, 3, 6),
        "transposed": torch.randn(6, 3, 2).permute(2, 1, 0),
        "sliced": torch.randn(2, 3, 9)[..., 3:],
    }
    torch.library.opcheck(normed_router, (x[kind], gain, weight, scale, 1e-5, 1.0))
    normed = torch.nn.functional.rms_norm(x[kind], (6,), None if gain is None else gain + 1, 1e-5)
    torch.testing.assert_close(normed_router(x[kind], gain, weight, scale, 1e-5, 1.0), router(normed, weight, scale))


@BITS
@pytest.mark.parametrize("gain", [None, torch.linspace(-1, 1, 6)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_opcheck_masked_gemv_normed(bits, gain, activation):
    weight, scale = stored(6, 256, bits)
    v, rest = torch.randn(3, 2, 6).transpose(0, 1), (torch.full((6,), 0.3), weight, torch.randn(256), scale, 0.5)
    torch.library.opcheck(masked_gemv_normed, (v, gain, *rest, activation, 1e-5, 1.0))
    normed = torch.nn.functional.rms_norm(v, (6,), None if gain is None else gain + 1, 1e-5)
    wanted = masked_gemv(normed, *rest) if activation is None else masked_gemv_gated(normed, *rest, activation)
    torch.testing.assert_close(masked_gemv_normed(v, gain, *rest, activation, 1e-5, 1.0), wanted)


def test_gradcheck_router():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in ((2, 3, 5), (4, 5)))
    assert torch.autograd.gradcheck(router, (x, weight))


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_masked_rows(bias):
    """The mask is a constant: dropped elements of a have no gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = (6, 5), (2, 3, 4), (4, 5), (4,)
    x, a, weight, c = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    kept = torch.rand(2, 3, 4, generator=generator) < 0.5

    def function(x, a, weight, *rest):
        return masked_rows(x, torch.where(kept, a, 0.0), weight, *rest)

    given = (x, a, weight, c) if bias else (x, a, weight)
    assert torch.autograd.gradcheck(function, given)
    dropped = torch.where(kept, a, 0.0).detach().requires_grad_()
    masked_rows(x, dropped, weight).sum().backward()
    assert bool((dropped.grad[~kept] == 0).all()) and bool((dropped.grad[kept] != 0).all())


@pytest.mark.parametrize("bits", [8, 4])
def test_gradcheck_through_quantised_weights(bits):
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    v = torch.where((v.square() - 0.3).abs() < 0.05, v + 0.3, v).requires_grad_()  # away from the threshold
    weight, scale = stored(6, 4, bits)
    tau = torch.full((6,), 0.3)
    assert torch.autograd.gradcheck(lambda v: masked_gemv(v, tau, weight, None, scale), (v,))
    weight, scale = stored(4, 6, bits)
    assert torch.autograd.gradcheck(lambda x: router(x, weight, scale), (v,))


@BITS
def test_reference_reads_what_is_stored(bits):
    weight, scale = stored(6, 8, bits)
    v, tau = torch.randn(2, 6), torch.full((6,), 0.3)
    plain = unpack(weight, scale)
    assert torch.equal(masked_gemv(v, tau, weight, None, scale), reference.masked_gemv(v, tau, plain))
    weight, scale = stored(8, 6, bits)
    assert torch.equal(router(v, weight, scale), reference.router(v, unpack(weight, scale)))


@BITS
def test_kernels_compute_the_same(device, bits):
    kernels_run_on(device)
    weight, scale = stored(31, 34, bits)
    case = Product(torch.randn(2, 31), torch.full((31,), 0.3), weight, scale, torch.randn(34)).to(device)
    with implementation("triton"):
        case.check(masked_gemv(case.v, case.tau, case.weight, case.bias, case.scale))
    weight, scale = stored(34, 62, bits)
    x, weight, scale = (None if tensor is None else tensor.to(device) for tensor in (torch.randn(2, 62), weight, scale))
    with implementation("triton"):
        z = router(x, weight, scale)
    # fp32 sums of at most 62 terms in two orders
    torch.testing.assert_close(z, reference.router(x, weight, scale), rtol=1e-5, atol=1e-5)


def test_kernels_compute_the_same_rows(device):
    kernels_run_on(device)
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 62), (34, 62), (34,)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    rows = Rows(x, masked_by(0.5, 2, 34, generator=generator), weight, bias).to(device)
    with implementation("triton"):
        rows.check(masked_rows(*rows.poisoned().operands))
    with implementation("reference"):
        rows.check(masked_rows(*rows.poisoned().operands))


@BITS
def test_kernels_compute_the_fused_forms(device, bits):
    kernels_run_on(device)
    weight, scale = stored(31, 256, bits)
    case = Product(torch.randn(2, 31), torch.full((31,), 0.3), weight, scale, torch.randn(256)).to(device)
    operands = case.v, case.tau, case.weight, case.bias, case.scale, 0.5
    residual = torch.randn(2, 256).to(device)
    with implementation("triton"):
        case.check(masked_gemv_add(*operands, residual), residual)
        for name, activation in reference.ACTIVATIONS.items():
            case.check_gated(masked_gemv_gated(*operands, name), activation)
    weight, scale = stored(34, 62, bits)
    x, gain, weight, scale = (None if t is None else t.to(device) for t in (torch.randn(2, 62), torch.randn(62), weight, scale))
    with implementation("triton"):
        z = normed_router(x, gain, weight, scale, 1e-5, 1.0)
    torch.testing.assert_close(z, reference.normed_router(x, gain, weight, scale, 1e-5, 1.0), rtol=1e-5, atol=1e-5)


def test_who_computes(device, monkeypatch):
    kernels_run_on(device)
    from rana_fx.kernels.triton import masked_gemv as launcher

    asked = []
    monkeypatch.setattr(
        launcher, "masked_gemv", lambda *operands: asked.append(operands[0].shape) or reference.masked_gemv(*operands)
    )

    def run(tokens, dtype=torch.float32):
        asked.clear()
        masked_gemv(*(torch.ones(shape, dtype=dtype, device=device) for shape in ((tokens, 4), (4,), (4, 3))))
        return bool(asked)

    assert run(1) == run(4) == (device.type == "cuda")
    # above four tokens the dense product of a floating weight is faster
    assert not run(5)
    with implementation("triton"):
        assert run(1)
        assert run(16)
        assert not run(17)
        assert not run(0)
        assert not run(1, torch.float64)
        with implementation("reference"):
            assert not run(1)
    assert not run(17)


def test_unknown_implementation_lists_the_known():
    with pytest.raises(UnknownChoice, match="auto, reference, tensor_cores, triton"), implementation("fast"):
        pass


def test_unknown_activation_lists_the_known():
    operands = torch.ones(1, 3), torch.ones(3), torch.ones(3, 4), None, None, 0.5
    with pytest.raises(UnknownChoice, match="silu, gelu_tanh, relu, gelu"):
        masked_gemv_gated(*operands, "tanh")


def test_shapes_of_fused_forms_are_checked_while_tracing():
    with torch._subclasses.FakeTensorMode():
        operands = torch.empty(1, 3), torch.empty(3), torch.empty(3, 5), None, None, 0.5
        with pytest.raises(RuntimeError, match="a multiple of 2"):
            masked_gemv_gated(*operands, "silu")
        with pytest.raises(RuntimeError, match="residual"):
            masked_gemv_add(*operands, torch.empty(5))


def test_rows_of_other_shapes_or_dtypes_are_refused_while_tracing():
    x, a, weight = (2, 5), (2, 3), (3, 5)
    with torch._subclasses.FakeTensorMode():
        for shapes in [((2, 4), a, weight), (x, (2, 4), weight), (x, (3, 3), weight)]:
            with pytest.raises(RuntimeError, match="expected"):
                masked_rows(*map(torch.empty, shapes))
        with pytest.raises(RuntimeError, match="one dtype"):
            masked_rows(torch.empty(x), torch.empty(a, dtype=torch.bfloat16), torch.empty(weight))


def test_a_missing_scale_is_refused():
    weight, _ = stored(6, 8, 8)
    with pytest.raises(BadOperand, match="scale is None"):
        masked_gemv(torch.ones(1, 6), torch.zeros(6), weight)
    with torch._subclasses.FakeTensorMode(), pytest.raises(BadOperand, match="scale is None"):
        router(torch.empty(1, 8), torch.empty(6, 8, dtype=torch.int8))
