"""The table of implementations: a toy backend from outside of the package, reasons why rows are not selected, and on a GPU the
choice by the cost model."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rana_fx._backend import _PostGrad
from rana_fx.errors import InvalidOption, UnknownChoice
from rana_fx.formats import pack
from rana_fx.kernels import cost, registry
from rana_fx.kernels.cuda import implementations as tensor_core_rows
from rana_fx.kernels.cuda import router_implementations as router_rows
from rana_fx.kernels.ops import implementation, masked_gemv
from rana_fx.kernels.problem import Problem, operand_of_tensor, problem_of
from rana_fx.kernels.registry import Implementation, register_implementation
from rana_fx.kernels.triton import implementations as triton_rows
from rana_fx.kernels.triton.config import cdiv
from tests.support.inductor import GEMV, compiled
from tests.support.products import Product

TOY = "torch.ops.toy_backend.gemv"
SHAPES = {"K": st.integers(1, 65536), "N": st.integers(1, 65536), "T": st.integers(1, 16), "density": st.floats(0, 1)}


# ---- an example backend


@torch.library.custom_op("toy_backend::gemv", mutates_args=())
def toy_gemv(v: torch.Tensor, tau: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.where(v.square() >= tau, v, 0.0) @ weight


@toy_gemv.register_fake
def _(v, tau, weight):
    return v.new_empty((*v.shape[:-1], weight.shape[1]))


class Toy:
    """``rana::masked_gemv`` on a CPU for two tokens in float32; ``launched`` and ``asked`` record its calls."""

    def __init__(self):
        self.launched, self.asked = [], []

    def accepts(self, problem):
        self.asked.append(problem)
        if problem.tokens != 2:
            return f"takes two tokens, not {problem.tokens}"
        return None if problem.dtype == problem.stored == torch.float32 else "takes float32"

    def launch(self, v, tau, weight, bias, scale):
        self.launched.append(tuple(v.shape))
        y = toy_gemv(v, tau, weight)
        return y if bias is None else y + bias

    def lower(self, problem, v_TK, tau, weight, bias, scale):
        from torch._inductor.lowering import fallback_handler, lowerings

        y_TN = fallback_handler(torch.ops.toy_backend.gemv.default, add_to_fallback_set=False)(v_TK, tau, weight)
        return y_TN if bias is None else lowerings[torch.ops.aten.add.Tensor](y_TN, bias)

    def row(self, **facts):
        return Implementation("masked_gemv", "toy", "cpu", self.accepts, launch=self.launch, lower=self.lower, **facts)


# ---- tests


@pytest.fixture
def toy():
    backend = Toy()
    unregister = register_implementation(backend.row())
    # graphs compiled with other rows are not reused
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield backend
    unregister()


def case(tokens, *, lead=(), dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    v, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((*lead, tokens, 31), (31, 34), (34,)))
    return Product(v, torch.full((31,), 0.3), weight, None, bias)


def test_a_backend_from_outside_computes_in_eager_mode(toy):
    two = case(2)
    with implementation("toy"):
        two.check(masked_gemv(two.v, two.tau, two.weight, two.bias))
        assert toy.launched == [(2, 31)]
        # the reference computes calls that the backend does not accept
        three = case(3)
        three.check(masked_gemv(three.v, three.tau, three.weight, three.bias))
    with implementation("reference"):
        masked_gemv(two.v, two.tau, two.weight)
    assert toy.launched == [(2, 31)]
    # in front of all others it is the default choice, too
    masked_gemv(two.v[None], two.tau, two.weight)
    assert toy.launched == [(2, 31), (1, 2, 31)]


def test_a_backend_from_outside_computes_in_compiled_code(toy):
    two = case(2)
    got, code = compiled(masked_gemv, two.v[None], two.tau, two.weight, two.bias)
    assert TOY in code and GEMV not in code
    two.check(got[0])
    assert not toy.launched
    three = case(3)
    got, code = compiled(masked_gemv, three.v, three.tau, three.weight, three.bias)
    assert TOY not in code and GEMV in code
    three.check(got)


def test_tensors_and_a_compiled_graph_make_one_problem(toy):
    for operands in (case(2), case(5, dtype=torch.bfloat16)):
        toy.asked.clear()
        masked_gemv(operands.v, operands.tau, operands.weight, operands.bias, None, 0.25)
        (eager,) = toy.asked
        compiled(masked_gemv, operands.v, operands.tau, operands.weight, operands.bias, None, 0.25)
        assert {dataclasses.replace(problem, compiled=False, most_tokens=eager.most_tokens) for problem in toy.asked} == {eager}
        assert toy.asked[-1].compiled and not eager.compiled
        assert (eager.tokens, eager.rows, eager.columns, eager.density) == (len(operands.v), 31, 34, 0.25)


def test_a_varying_number_of_tokens_is_unknown(toy):
    three = case(3)
    compiled(masked_gemv, three.v, three.tau, three.weight, dynamic=True)
    # twice where the choice is logged
    assert {problem.tokens for problem in toy.asked} == {None}
    passed = {row.name: reason for row, reason in registry.why(toy.asked[0])}
    assert "an unknown number of tokens" in passed["cpp"]
    assert list(passed) == ["toy", "tensor_cores", "triton", "cpp"]


def test_reasons_are_given_and_logged(toy, caplog):
    three = case(3)
    with caplog.at_level(logging.DEBUG, "rana_fx.passes.lower"):
        compiled(masked_gemv, three.v, three.tau, three.weight)
    (line,) = (record.getMessage() for record in caplog.records if record.name == "rana_fx.passes.lower")
    assert line.startswith("masked_gemv by cpp; toy takes two tokens, not 3; tensor_cores is for cuda, the operands are on cpu;")
    problem = toy.asked[-1]
    assert [(row.name, reason) for row, reason in registry.why(problem)] == [
        ("toy", "takes two tokens, not 3"),
        ("tensor_cores", "is for cuda, the operands are on cpu"),
        ("triton", "is for cuda, the operands are on cpu"),
    ]
    # no row is before the first
    assert registry.why(dataclasses.replace(problem, tokens=2)) == []


def test_order_and_names_follow_the_table(toy):
    assert [row.name for row in registry.implementations("masked_gemv")] == ["toy", "tensor_cores", "triton", "cpp", "reference"]
    behind = Toy()
    undo = register_implementation(dataclasses.replace(behind.row(), name="late"), before="reference")
    try:
        assert [row.name for row in registry.implementations("masked_gemv")][-2:] == ["late", "reference"]
        assert registry.launchable() == ("late", "reference", "tensor_cores", "toy", "triton")
    finally:
        undo()
        undo()  # a second call has no effect
    assert registry.launchable() == ("reference", "tensor_cores", "toy", "triton")


def test_a_row_that_is_taken_out_is_forgotten():
    before = registry.implementations("masked_gemv")
    register_implementation(Toy().row())()
    assert registry.implementations("masked_gemv") == before
    with pytest.raises(UnknownChoice, match="auto, reference, tensor_cores, triton"), implementation("toy"):
        pass


def test_impossible_rows_are_refused(toy):
    row = toy.row()
    with pytest.raises(UnknownChoice, match="masked_gemv, router"):
        register_implementation(dataclasses.replace(row, op="matmul"))
    with pytest.raises(UnknownChoice, match="toy, tensor_cores, triton, cpp, reference"):
        register_implementation(dataclasses.replace(row, name="other"), before="fast")
    with pytest.raises(InvalidOption, match="a launcher"):
        register_implementation(Implementation("router", "other"))
    for name in ("auto", "toy"):
        with pytest.raises(InvalidOption, match=name):
            register_implementation(dataclasses.replace(row, name=name))
    with pytest.raises(InvalidOption, match="reference"):
        register_implementation(dataclasses.replace(row, name="reference", device=None))
    with pytest.raises(UnknownChoice, match="masked_gemv, router"):
        registry.implementations("matmul")


def test_the_cache_key_depends_on_what_is_registered(tmp_path):
    """Compiled code is not reused with another table or another version of a backend."""
    source, seen = tmp_path / "other_backend.py", set()
    key = _PostGrad(types.SimpleNamespace(matches=types.SimpleNamespace(attachments=())))
    for text in ("def lower(*operands): return 1\n", "def lower(*operands): return 2\n"):
        source.write_text(text)
        spec = importlib.util.spec_from_file_location("other_backend", source)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for before in (None, "reference"):
            undo = register_implementation(Implementation("router", "other", lower=module.lower), before=before)
            seen.add((registry.fingerprint(), key.uuid()))
            undo()
    assert registry.fingerprint() == ""
    seen.add((registry.fingerprint(), key.uuid()))
    assert len({mark for mark, _ in seen}) == len({uuid for _, uuid in seen}) == 5


@pytest.mark.parametrize("op", registry.OPERATIONS)
def test_every_row_names_code_that_exists(op):
    rows = registry.implementations(op)
    assert rows[-1].name == registry.REFERENCE and rows[-1].launch and rows[-1].lower
    for row in rows:
        if row.name == "triton":
            pytest.importorskip("triton")
        for compiled_mode, given_code in ((False, row.launch), (True, row.lower)):
            if given_code is not None:
                assert callable(row.code(compiled=compiled_mode))


# ---- choices for a GPU, without one


def on_gpu(op, rows, columns, tokens, density, *, bits=16, **facts):
    stored = {4: torch.uint8, 8: torch.int8, 16: torch.bfloat16, 32: torch.float32}[bits]
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    return Problem(op, torch.device("cuda"), dtype, tokens, tokens, rows, columns, stored, bits, density=density, **facts)


@pytest.fixture(scope="module")
def h200():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "nearest", lambda device: cost.H200)
        patch.setattr(triton_rows, "_installed", lambda: True)
        patch.setattr(tensor_core_rows, "_device", lambda device: None)
        patch.setattr(router_rows, "_device", lambda device: "tests/kernels/test_router_tensor_cores.py has its tests")
        with torch._inductor.config.patch({"triton.cudagraphs": True}):
            yield


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("op", ["masked_gemv", "masked_gemv_add", "masked_gemv_gated"])
@given(**SHAPES, bits=st.sampled_from([4, 8, 16, 32]))
def test_compiled_gemv_is_the_cost_models_choice(op, K, N, T, density, bits):
    problem = on_gpu(op, K, N, T, density, bits=bits)
    wins = cost.prefers_masked(K, N, T, density, cost.H200, bits=bits)
    # a launch has a counter for 64 columns and 4 tokens, and room for two parts that end within such a block
    fits = (cdiv(N, 64) + 2) * cdiv(T, 4) <= 4096
    dense_us = cost.dense_us(K, N, cost.H200, bits=bits, launches=2)
    # what it accepts: test_tensor_cores.py
    tensor_cores = next(row for row in registry.implementations(op) if row.name == "tensor_cores")
    us = cost.tensor_core_us(K, N, T, density, cost.H200, bits=bits)
    first = tensor_cores.accepts(problem) is None and us < dense_us
    # in 16 bits the Triton kernel may be faster, too
    first = first and (bits < 16 or us <= cost.masked_us(K, N, T, density, cost.H200))
    assert (registry.choose(problem).name == "tensor_cores") == first
    assert (registry.choose(problem).name == "triton") == (wins and fits and not first)
    reasons = {row.name: reason for row, reason in registry.why(problem)}
    assert registry.choose(problem).name != "reference" or not fits or "us of a dense matmul" in reasons["triton"]


@pytest.mark.usefixtures("h200")
@given(**SHAPES, bits=st.sampled_from([16, 32]))
def test_compiled_rows_are_the_cost_models_choice(K, N, T, density, bits):
    problem = on_gpu("masked_rows", N, K, T, density, bits=bits)
    assert (registry.choose(problem).name == "triton") == cost.prefers_rows(N, K, T, density, cost.H200, bits=bits)


@pytest.mark.usefixtures("h200")
@given(K=SHAPES["K"], N=st.integers(1, 65000), density=SHAPES["density"], bits=st.sampled_from([4, 8, 16]))
def test_tokens_skipped_is_where_masks_stop_winning(K, N, density, bits):
    stored = {4: torch.uint8, 8: torch.int8, 16: torch.bfloat16}[bits]
    with torch._inductor.config.patch({"triton.cudagraphs": False}):
        found = registry.tokens_skipped(K, N, density, stored, torch.device("cuda"))
    wins = [cost.prefers_masked(K, N, T, density, cost.H200, bits=bits) for T in range(1, 17)]
    assert found == (16 if all(wins) else wins.index(False))


def test_tokens_skipped_elsewhere():
    for stored in (torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8):
        assert registry.tokens_skipped(64, 64, 0.5, stored, torch.device("cpu")) == 8
        assert registry.tokens_skipped(64, 64, 0.5, stored, torch.device("meta")) == 0
    assert [registry.tokens_fused(op, "cuda") for op in registry.FUSED] == [4] * 5
    assert [registry.tokens_fused(op, "cpu") for op in registry.FUSED] == [0] * 5


@pytest.mark.parametrize(
    ("op", "facts", "reason"),
    [
        ("masked_gemv", dict(contiguous_rows=False), "not contiguous"),
        ("masked_gemv", dict(tokens=17), "17 tokens"),
        ("masked_gemv", dict(tokens=None), "sizes vary"),
        ("masked_gemv", dict(columns=None), "sizes vary"),
        ("masked_gemv", dict(dtype=torch.float64), "torch.float64"),
        ("masked_gemv", dict(stored=torch.float8_e4m3fn, bits=8), "torch.float8_e4m3fn"),
        ("masked_gemv", dict(columns=64 * 4096), "counters"),
        ("masked_gemv_parts", dict(weights=4), "4 weights"),
        ("masked_gemv_parts", dict(alike=False), "one dtype"),
        ("router", dict(tokens=5), "more than 4 tokens"),
        ("normed_router", dict(tokens=5), "more than 4 tokens"),
        ("masked_rows", dict(tokens=5), "more than 4 tokens"),
        ("masked_rows", dict(contiguous_rows=False), "not contiguous"),
    ],
)
def test_why_not_on_a_gpu(h200, op, facts, reason):
    problem = on_gpu(op, 4096, 12288, 1, 0.3)
    if op == "masked_gemv_parts":
        problem = dataclasses.replace(problem, weights=3)
    refused = dataclasses.replace(problem, **facts)
    with torch._inductor.config.patch({"triton.cudagraphs": False}):
        assert registry.choose(problem).name == "triton"
        assert registry.choose(refused).name == "reference"
        name, given_reason = next((row.name, text) for row, text in registry.why(refused) if row.name == "triton")
    assert name == "triton" and reason in given_reason


def test_eager_mode_launches_for_few_tokens_whatever_the_density(h200):
    for tokens, bits, wanted in ((4, 16, "triton"), (5, 16, "reference"), (16, 8, "triton"), (17, 8, "reference")):
        for op in ("masked_gemv", "router"):
            problem = dataclasses.replace(on_gpu(op, 256, 256, tokens, 1.0, bits=bits), compiled=False, contiguous_rows=False)
            assert registry.choose(problem).name == wanted
    for tokens, wanted in ((4, "tensor_cores"), (5, "reference")):
        problem = dataclasses.replace(on_gpu("masked_gemv", 256, 256, tokens, 1.0), compiled=False)
        assert registry.choose(problem).name == wanted
    # selected by name, for every call that it accepts
    problem = dataclasses.replace(on_gpu("masked_gemv", 256, 256, 16, 1.0), compiled=False, device=torch.device("cpu"))
    assert registry.choose(problem).name == "reference"
    assert registry.choose(problem, name="triton").name == "triton"


@pytest.mark.parametrize("bits", [8, 4])
def test_columns_are_those_of_the_matrix(bits):
    stored, scale = pack(torch.randn(6, 128), bits)
    arguments = dict(v=torch.ones(2, 3, 6), tau=torch.zeros(6), weight=stored, bias=None, scale=scale, density=0.5)
    problem = problem_of("masked_gemv", arguments, operand_of_tensor, compiled=False)
    assert (problem.tokens, problem.rows, problem.columns, problem.bits, problem.quantized) == (6, 6, 128, bits, True)
