"""A storage format from outside of the package, from packing to the rewritten model."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rana_fx
from rana_fx import formats
from rana_fx.adapter import Adapter
from rana_fx.calibration.batches import call
from rana_fx.errors import BadOperand, InvalidOption
from rana_fx.evaluation.measure import measuring
from rana_fx.formats import INT8, Format, Matrix, base
from rana_fx.kernels import ops, reference
from rana_fx.passes import sources
from rana_fx.plan import Plan, SiteRecord
from tests.support.architectures import output
from tests.support.storages import sites_of, stored_plan


class Pairs(Format):
    """6 bits per number, two in an int16: values = (q_even + 32) + 64 * (q_odd + 32), w = q * scale of the row, |q| <= 31."""

    name = "pairs of 6 bits"
    dtypes = (torch.int16,)
    expects = "torch.int16 (pairs of 6 bits)"
    multiple = 2

    def bits(self, dtype):
        return 6

    def columns(self, stored):
        return 2 * stored

    def unit(self, matrix):
        return 2

    def divisible(self, matrix, start, stop):
        return start % 2 == stop % 2 == 0

    def spans(self, matrix, start, stop):
        return (start // 2, stop // 2), None

    def check(self, matrix):
        if matrix.scale is None or tuple(matrix.scale.shape) != (matrix.shape[0],):
            got = "None" if matrix.scale is None else str(tuple(matrix.scale.shape))
            raise BadOperand(name="scale", got=got, expected=f"({matrix.shape[0]},)", todo="Pass what pack gave.")

    def pack(self, weight, *, scale_dtype=torch.float32):
        scale = (weight.abs().amax(1) / 31).to(scale_dtype)
        q = (weight / scale.float().clamp_min(1e-30).unsqueeze(1)).round().clamp(-31, 31).to(torch.int16) + 32
        return Matrix(q[:, 0::2] + 64 * q[:, 1::2], scale, self)

    def dequantize(self, matrix, dtype):
        q = torch.stack([matrix.values % 64, matrix.values // 64], -1).reshape(matrix.shape) - 32
        wide = torch.promote_types(dtype, torch.float32)
        return (q.to(wide) * matrix.scale.to(wide).unsqueeze(1)).to(dtype)

    def error_bound(self, matrix):
        return (matrix.scale.float() * (0.5 + 31 * torch.finfo(torch.float32).eps)).unsqueeze(1).expand(matrix.shape)


@pytest.fixture(scope="module", autouse=True)
def pairs():
    """Registered for the tests of this file."""
    before = dict(base._FORMATS)
    yield formats.register_format(Pairs())
    base._FORMATS.clear()
    base._FORMATS.update(before)


def test_a_name_and_a_dtype_belong_to_one_format(pairs):
    with pytest.raises(InvalidOption, match="a name that no registered format has"):
        formats.register_format(Pairs())
    other = Pairs()
    other.name, other.dtypes = "other", (torch.int64, torch.int8)
    with pytest.raises(InvalidOption, match=r"torch.int8.*belongs to int8"):
        formats.register_format(other)
    assert formats.registered()[-1] is pairs
    assert __file__ in formats.sources()  # a change of this file invalidates compiled code


def test_it_is_found_by_its_dtype(pairs):
    made = pairs.pack(torch.randn(3, 8))
    assert formats.format_of(made.values) is pairs and not formats.is_plain(made.values)
    assert formats.bits_of(made.values) == 6
    assert formats.shape_of(made.values, made.scale) == (3, 8)
    assert formats.gated_unit(made.values, made.scale) == 4
    assert Matrix.of(made.values, made.scale).bytes_per_row == 8 / 2 * 2 + 4
    with pytest.raises(BadOperand, match=r"scale is None: expected \(3,\)"):
        Matrix.of(made.values)
    with pytest.raises(BadOperand, match=r"torch.int16 \(pairs of 6 bits\)"):
        formats.format_of(torch.int32)  # the error names all formats


def adapter_of(weight: torch.Tensor, stored: Matrix, name: str = "site") -> Adapter:
    """A neuron adapter of a linear (out, in) whose weight is stored input-major."""
    out, width = weight.shape
    made = Adapter(
        name=name, kind="neuron", sites=(name,), ranks=width, kept=width / 2, tau=torch.full((width,), 0.25),
        weight=stored.values, weight_scale=stored.scale, dense_flops=float(out * width), dense_bytes=4.0 * out * width,
    )  # fmt: skip
    return made.costed()


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**16))
def test_adapters_and_operations_take_it(width, pairs_of_outputs, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2 * pairs_of_outputs, width, generator=generator)
    stored = formats.format_of(torch.int16).pack(weight.t())
    numbers = stored.dequantize()
    assert ((numbers - weight.t()).abs() <= stored.format.error_bound(stored)).all()
    adapter = adapter_of(weight, stored)
    assert (adapter.width, adapter.out, adapter.bits()) == (width, len(weight), {"weight": 6})
    assert adapter.expected_cost.bytes == pytest.approx(width / 2 * (len(weight) / 2 * 2 + 4))
    assert adapter.trained == () and adapter.to(torch.bfloat16).weight is not None
    assert torch.equal(adapter.to(torch.bfloat16).weight, stored.values)
    v = torch.randn(2, width, generator=generator)
    got = ops.masked_gemv(v, adapter.tau, adapter.weight, None, adapter.weight_scale)
    assert torch.equal(got, reference.masked_gemv(v, adapter.tau, numbers))
    with ops.implementation("triton"):  # no kernel reads it
        assert torch.equal(ops.masked_gemv(v, adapter.tau, adapter.weight, None, adapter.weight_scale), got)
    rows = stored.format.pack(torch.randn(3, 2 * width, generator=generator))
    x = torch.randn(2, 2 * width, generator=generator)
    assert torch.equal(ops.router(x, rows.values, rows.scale), reference.router(x, rows.dequantize()))


def test_plans_keep_it(pairs, tmp_path):
    weight = torch.randn(6, 5)
    stored = pairs.pack(weight.t())
    record = SiteRecord("site", "up", "linear", 6, 5, False, 1, True, "float32", "")
    plan = Plan("own", "bytes", 0.5, 0, 10, "M", {}, (record,), (adapter_of(weight, stored),), ())
    plan.save(tmp_path)
    loaded = rana_fx.load_plan(tmp_path)
    assert loaded.digest() == plan.digest()
    assert loaded.adapters[0].weight.dtype == torch.int16
    assert torch.equal(loaded.adapters[0].matrix("weight").dequantize(), stored.dequantize())
    assert loaded.expected_budget() == plan.expected_budget() == plan.adapters[0].bytes / plan.adapters[0].dense_bytes
    assert "weights 6 bit" in plan.summary(all=True)
    base._FORMATS.pop(pairs.name)  # without the registration the plan is refused, with its dtype in the error
    try:
        with pytest.raises(rana_fx.errors.PlanFileError, match=r"weight is torch.int16: expected floating"):
            rana_fx.load_plan(tmp_path)
    finally:
        base._FORMATS[pairs.name] = pairs


def test_a_model_runs_with_it(pairs):
    model, batch, plan = stored_plan("plain_llama", 1, "stored, 8")
    twin, sites, adapters = copy.deepcopy(model), None, []
    sites = sites_of(twin, batch)
    for adapter in plan.adapters:
        stored = pairs.pack(adapter.matrix("weight").dequantize())
        adapters.append(replace(adapter, weight=stored.values, weight_scale=stored.scale).costed())
        parts = stored.dequantize().t().split([sites[name].out_features for name in adapter.sites])
        for name, part in zip(adapter.sites, parts, strict=True):
            sites[name].view.data.copy_(part)
    rana_fx.attach(model, replace(plan, adapters=tuple(adapters)))
    assert all(buffer.dtype == torch.int16 for name, buffer in model.rana_fx.named_buffers() if name.endswith("_weight"))
    assert not any(name.endswith("_weight") for name, _ in model.rana_fx.named_parameters())
    with torch.no_grad():
        expected = output(call(twin, batch))
        with measuring(model) as meter:
            got = output(meter.run(batch))
        through_inductor = output(call(torch.compile(model, backend=rana_fx.backend), batch))
    # all multiply by the same fp32 numbers, in another order of terms: a few thousand roundings of 2^-24
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(through_inductor, expected, rtol=1e-4, atol=1e-4)
    row = next(row for row in rana_fx.explain(model, batch).rows if row.site.endswith("q_proj"))
    assert "weights 6 bit" in row.detail


def test_float8_is_no_plain_number():
    weight = torch.ones(2, 4).to(torch.float8_e4m3fn)
    assert not formats.is_plain(weight)
    for ask in (lambda: formats.bits_of(weight), lambda: Matrix.of(weight), lambda: formats.unpack(weight, None)):
        with pytest.raises(BadOperand, match="torch.float8_e4m3fn: expected floating"):
            ask()
    with pytest.raises(BadOperand, match="float8"):
        ops.masked_gemv(torch.ones(1, 2), torch.zeros(2), weight)
    assert formats.format_of(torch.int8) is INT8


def test_its_file_is_part_of_the_key_of_compiled_code(pairs):
    assert __file__ in sources.hashed_files()
