"""The masked GEMV on tensor cores (kernels/cuda): its source under an emulator, launches on a GPU, what it declines and why."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rana_fx.errors import BadOperand, InvalidOption, KernelNotCompiled, UnknownChoice
from rana_fx.formats import bits_of, pack, shape_of
from rana_fx.kernels import cost, registry
from rana_fx.kernels.cuda import implementations, nvrtc, op
from rana_fx.kernels.cuda import masked_gemv as kernel
from rana_fx.kernels.cuda.config import Config, default_config, most_shared_bytes
from rana_fx.kernels.problem import Problem, operand_of_tensor
from rana_fx.kernels.reference import ACTIVATIONS
from rana_fx.passes import lower
from tests.support import emulated
from tests.support.emulated import product

GPU = [pytest.param("cuda", marks=pytest.mark.gpu)]


# ---- the source under the emulator. A case is one compilation: what a constant decides is in some of them


CASES = {
    "one token, a partial segment": (product(1, 97, 512 + 96, 4, scale_dtype=torch.float32), Config(1, 2, 2, 3)),
    "one token, 8 bits": (product(1, 203, 144, 8), Config(1, 2, 3, 2)),
    "two tokens, groups of 128": (product(2, 64, 512, 4, group=128), Config(2, 1, 1, 4)),
    "two tokens, 8 bits, two segments": (product(2, 130, 272, 8, scale_dtype=torch.float32), Config(2, 2, 2, 3)),
    "three tokens, fp16": (product(3, 120, 256, 4, dtype=torch.float16), Config(1, 2, 2, 3)),
    "three tokens, 8 bits": (product(3, 130, 144, 8), Config(1, 2, 1, 2)),
    "five tokens, fp32 scales, a partial segment": (product(5, 97, 512 + 96, 4, scale_dtype=torch.float32), Config(2, 1, 2, 3)),
    "six tokens": (product(6, 120, 256, 4), Config(1, 2, 1, 3)),
    "seven tokens, fp16, 8 bits": (product(7, 70, 128, 8, dtype=torch.float16), Config(1, 1, 2, 3)),
    "eight tokens, groups of 128": (product(8, 150, 512, 4, group=128), Config(1, 2, 2, 2)),
    "eight tokens, fp16, groups of 128": (
        product(8, 60, 256, 4, group=128, dtype=torch.float16, scale_dtype=torch.float16),
        Config(1, 1, 1, 4),
    ),
    "nine tokens, 8 bits, two segments": (product(9, 80, 272, 8, scale_dtype=torch.float32), Config(2, 1, 2, 3)),
    "nine tokens, fp16": (product(9, 70, 256, 4, dtype=torch.float16, scale_dtype=torch.float32), Config(1, 1, 2, 2)),
    "sixteen tokens": (product(16, 90, 256, 4, group=128, scale_dtype=torch.float32), Config(1, 2, 2, 2)),
    "sixteen tokens, 8 bits": (product(16, 60, 128, 8), Config(1, 2, 1, 2)),
    "sixteen tokens, fp16, 8 bits": (product(16, 60, 128, 8, dtype=torch.float16, scale_dtype=torch.float32), Config(1, 2, 1, 2)),
    "one token, 16 bits, a partial segment": (product(1, 97, 64 + 24, 16), Config(1, 2, 2, 3)),
    "two tokens, fp16, 16 bits, two segments": (product(2, 64, 136, 16, dtype=torch.float16), Config(2, 1, 1, 4)),
    "five tokens, 16 bits": (product(5, 130, 64, 16), Config(1, 2, 3, 2)),
    "eleven tokens, fp16, 16 bits": (product(11, 70, 72, 16, dtype=torch.float16), Config(1, 1, 2, 3)),
    "sixteen tokens, 16 bits": (product(16, 60, 200, 16), Config(2, 2, 1, 2)),
}
EACH = pytest.mark.parametrize("name", CASES)


@EACH
def test_matches_fp64(name):
    """Few, many, all and no ranks kept, outliers, and values of one sign: the offset of stored numbers dominates the sums."""
    case, config = CASES[name]
    (tokens, ranks), bits, columns = case.v.shape, bits_of(case.weight), shape_of(case.weight, case.scale)[1]
    facts = dict(dtype=case.v.dtype, group=128 if "128" in name or name == "sixteen tokens" else 64)
    facts |= {} if case.scale is None else dict(scale_dtype=case.scale.dtype)
    for more in (dict(), dict(threshold=8.0), dict(threshold=0.0), dict(threshold=1e30), dict(outliers=2), dict(positive=True)):
        one = product(tokens, ranks, columns, bits, **facts | more)
        one.check(emulated.masked_gemv(*one.operands, config=config))


@pytest.mark.parametrize(
    "name",
    [
        "one token, a partial segment",
        "two tokens, 8 bits, two segments",
        "six tokens",
        "nine tokens, 8 bits, two segments",
        "one token, 16 bits, a partial segment",
        "eleven tokens, fp16, 16 bits",
    ],
)
def test_an_early_launch_reads_no_value_before_it_waits(name):
    """Where no threshold drops anything weights are copied before; one threshold makes the lists wait for the values."""
    case, config = CASES[name]
    for tau in (torch.zeros_like(case.tau), torch.full_like(case.tau, -1), case.tau, torch.eye(1, len(case.tau))[0] * 1e30):
        one = dataclasses.replace(case, tau=tau)
        y = emulated.masked_gemv(*one.operands, config=config, early=True)
        one.check(y)
        assert torch.equal(y, emulated.masked_gemv(*one.operands, config=config))


def test_one_and_two_tokens_whose_integers_do_not_fit():
    """They take the products of floats."""
    config = Config(8, 2, 1, 6)
    for tokens in (1, 2):
        case = product(tokens, 512, 256, 4, scale_dtype=torch.float32)
        assert not config.integers(512, tokens, 4, 64, 4)
        case.check(emulated.masked_gemv(*case.operands, config=config))


RANGES = [(1e-5, torch.float16), (1e4, torch.float16), (1e-20, torch.bfloat16), (1e6, torch.bfloat16)]


@pytest.mark.parametrize(("scale", "dtype"), RANGES)
def test_small_and_large_weights(scale, dtype):
    """In 8 bits the range of fp16 is that of values, not of their products by scales."""
    for bits in (4, 8) if dtype == torch.bfloat16 else (8,):
        case = product(3, 64, 128, bits, scale_dtype=torch.float32, dtype=dtype, bias=False)
        v = case.v / scale if scale > 1 else case.v
        case = dataclasses.replace(case, v=v.to(dtype), scale=case.scale * scale, tau=torch.zeros(64))
        case.check(emulated.masked_gemv(*case.operands, config=Config(1, 1, 1, 2)))


@pytest.mark.parametrize(
    ("bits", "activation"), [(4, "silu"), (4, "gelu"), (8, "gelu_tanh"), (8, "relu"), (16, "silu"), (16, "gelu")]
)
def test_the_activation_of_one_half_times_the_other(bits, activation):
    case = product(1, 80, 512, bits)
    case.check_gated(
        emulated.masked_gemv(*case.operands, activation=activation, config=Config(2, 1, 2, 3)), ACTIVATIONS[activation]
    )


@pytest.mark.parametrize(("bits", "half"), [(4, 320), (8, 80), (16, 72)])
def test_halves_that_end_within_a_segment(bits, half):
    """What lies behind the first half is not read as its columns."""
    case = product(1, 48, 2 * half, bits, scale_dtype=torch.float32)
    y = emulated.masked_gemv(*case.operands, activation="relu", config=Config(2, 1, 1, 2))
    case.check_gated(y, ACTIVATIONS["relu"])


@pytest.mark.parametrize("bits", [4, 8])
def test_outliers_leave_the_other_factors(bits):
    """One value is 2^12 times the others; its weights are zero, so that the result is of the others alone."""
    case = product(1, 64, 256, bits, bias=False, threshold=0.0)
    v, weight = case.v.clone(), case.weight.clone()
    v[0, 7], weight[7] = 4096.0, 0x88 if bits == 4 else 0
    found = dataclasses.replace(case, v=v, weight=weight)
    y = emulated.masked_gemv(*found.operands, config=Config(1, 1, 1, 2))
    found.check(y)
    assert torch.equal(y, emulated.masked_gemv(torch.where(v == 4096, 1.0, v), *found.operands[1:], config=Config(1, 1, 1, 2)))


@pytest.mark.parametrize("bits", [4, 16])
def test_a_residual_is_added_in_fp32(bits):
    case = product(2, 64, 256, bits, bias=False)
    residual = 100 * torch.randn(2, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    case.check(emulated.masked_gemv(*case.operands, residual=residual, config=Config(1, 1, 1, 2)), residual)


@pytest.mark.parametrize(
    ("bits", "tokens", "dtype"),
    [
        (4, 1, torch.bfloat16),
        (8, 2, torch.bfloat16),
        (4, 5, torch.bfloat16),
        (8, 9, torch.bfloat16),
        (4, 3, torch.float16),
        (8, 3, torch.float16),
        (16, 1, torch.bfloat16),
        (16, 9, torch.float16),
    ],
)
@pytest.mark.parametrize("odd", [float("inf"), float("nan"), -float("inf")])
def test_what_is_not_finite_is_so_where_it_is_in_the_dense_product(bits, tokens, dtype, odd):
    """Infinity times a number has its sign, times zero it is NaN; other tokens are as without it."""
    case = product(tokens, 64, 256, bits, dtype=dtype, bias=False)
    v = case.v.clone()
    v[0, 5] = odd
    y = emulated.masked_gemv(v, *case.operands[1:], config=Config(1, 2, 1, 3))
    exact, _ = dataclasses.replace(case, v=v).sums()
    exact = torch.where(torch.isnan(v.float()).any(1, keepdim=True), torch.nan, exact)
    assert torch.equal(y.isnan(), exact.isnan())
    assert torch.equal(y[exact.isinf()].double(), exact[exact.isinf()])
    if tokens > 1:
        dataclasses.replace(case, v=case.v[1:]).check(y[1:])


def test_a_value_at_its_threshold_is_kept():
    """Squares of small integers are exact; a row of ones shows what is kept."""
    v = torch.tensor([[2.0, -3.0, 2.0, 1.0] * 8]).bfloat16()
    tau = torch.tensor([4.0, 9.0, 5.0, 0.5] * 8)
    weight, scale = pack(torch.eye(32).repeat(1, 8), 4, 64, torch.float32)
    weight, scale = torch.where(weight == 0x88, 0x88, weight), torch.ones_like(scale)
    y = emulated.masked_gemv(v, tau, weight, None, scale, config=Config(1, 1, 2, 2))
    assert torch.equal(y.reshape(8, 32)[0], torch.where(torch.tensor([True, True, False, True] * 8), 7 * v[0], 0.0))


def test_any_strides_of_activations():
    case = product(3, 48, 256, 4)
    apart = torch.zeros(3, 3 * 48, dtype=torch.bfloat16)[:, ::3]
    apart.copy_(case.v)
    tau = torch.zeros(48, 2)[:, 1].copy_(case.tau)
    case.check(emulated.masked_gemv(apart, tau, *case.operands[2:], config=Config(1, 1, 1, 2)))


# ---- on a GPU


@pytest.mark.parametrize("device", GPU, indirect=True)
@settings(max_examples=25)
@given(data=st.data())
def test_a_launch_matches_fp64(device, data):
    bits = data.draw(st.sampled_from([4, 8, 16]))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    tokens = data.draw(st.integers(1, 16))
    columns = data.draw(st.integers(1, 40)) * {4: 64, 8: 32, 16: 8}[bits]
    facts = dict(
        threshold=data.draw(st.sampled_from([0.0, 0.3, 8.0, 1e30])),
        scale_dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
        group=data.draw(st.sampled_from([64, 128])),
        outliers=data.draw(st.integers(0, 2)),
        positive=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 99)),
    )
    case = product(tokens, data.draw(st.sampled_from([1, 16, 97, 512, 4100])), columns, bits, dtype=dtype, **facts).to(device)
    if kernel.refusal(case.v, case.tau, case.weight, case.scale) is not None:
        return
    config = data.draw(st.sampled_from([None, Config(1, 4, 8, 3), Config(2, 2, 3, 4), Config(1, 8, 6, 3), Config(1, 1, 1, 2)]))
    y = kernel.masked_gemv(*case.operands, config=config)
    case.check(y)
    for early in (False, True):
        assert torch.equal(y, kernel.masked_gemv(*case.operands, config=config, early=early))


@pytest.mark.parametrize("device", GPU, indirect=True)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_opcheck(device, bits):
    case = product(2, 64, 512, bits).to(device)
    for activation, residual in ((None, None), ("silu", None), (None, torch.randn(2, 512, device=device).bfloat16())):
        fields = list(dataclasses.astuple(default_config(64, 512, 2, bits=bits, gated=activation is not None)))
        operands = (case.v, case.tau, case.weight, case.bias, case.scale, residual, activation)
        torch.library.opcheck(op.masked_gemv_tensor_cores, (*operands, None, None, 0.0, fields, False))


@pytest.mark.parametrize("device", GPU, indirect=True)
@pytest.mark.parametrize("bits", [4, 16])
def test_compiled_graphs_launch_it(device, bits):
    """In a CUDA graph; the result is the eager launch's to the bit."""
    case = product(1, 512, 1024, bits, bias=False).to(device)

    def step(v, residual):
        return torch.ops.rana.masked_gemv(v, case.tau, case.weight, None, case.scale, 0.5) + residual

    residual = torch.randn(1, 1024, device=device).bfloat16()
    lower.register()
    wanted = kernel.masked_gemv(*case.operands) + residual
    compiled = torch.compile(step, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(compiled(case.v, residual), wanted)


@pytest.mark.parametrize("device", GPU, indirect=True)
@pytest.mark.parametrize("bits", [4, 16])
def test_memory_that_begins_anywhere_is_copied(device, bits):
    case = product(1, 64, 256, bits).to(device)
    moved = torch.empty(case.weight.numel() + 4, dtype=case.weight.dtype, device=device)[4:]
    moved = moved.view_as(case.weight).copy_(case.weight)
    moved = torch.from_dlpack(moved)  # a tensor without an offset, at an address that is no multiple of 16
    case.check(kernel.masked_gemv(case.v, case.tau, moved, case.bias, case.scale))


# ---- what is declined


@pytest.fixture
def sm90(monkeypatch):
    monkeypatch.setattr(cost, "nearest", lambda device: cost.H200)
    monkeypatch.setattr(implementations, "_device", lambda device: None)
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        yield


def problem(**facts):
    made = Problem("masked_gemv", torch.device("cuda"), torch.bfloat16, 1, 1, 4096, 4096, torch.uint8, 4, density=0.5)
    return dataclasses.replace(made, **facts)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (dict(tokens=17), "17 tokens, it takes 1 to 16"),
        (dict(tokens=17, dtype=torch.float16), "17 tokens, it takes 1 to 16"),
        (dict(tokens=None), "sizes vary"),
        (dict(dtype=torch.float32), "not torch.float32 by torch.uint8"),
        (dict(stored=torch.float16, bits=16), "not torch.bfloat16 by torch.float16"),
        (dict(stored=torch.float32, bits=32), "not torch.bfloat16 by torch.float32"),
        (dict(columns=4096 + 4, stored=torch.bfloat16, bits=16), "4100 columns in 16 bits are not made of aligned 16 bytes"),
        (
            dict(op="masked_gemv_gated", gated=True, columns=4096 + 8, stored=torch.bfloat16, bits=16),
            "4104 columns are no multiples of 8",
        ),
        (dict(rows=16, columns=16, tokens=4, stored=torch.bfloat16, bits=16), "of the Triton kernel"),
        (dict(columns=4096 + 16), "4112 columns in 4 bits are not made of aligned 16 bytes"),
        (dict(contiguous_rows=False), "not made of aligned 16 bytes"),
        (dict(scale_alignment=2), "multiples of 4 bytes"),
        (dict(rows=10**6), "lists of 1000000 ranks for 1 tokens need"),
        (dict(op="masked_gemv_gated", gated=True, columns=4096 + 256), "no multiples of 256"),
        (dict(op="masked_gemv_normed", gated=True, columns=4096 + 256), "no multiples of 256"),
        (dict(op="masked_gemv_normed", tokens=5), "5 tokens, with a norm it takes 1 to 4"),
    ],
)
def test_what_is_declined_and_why(sm90, facts, reason):
    assert registry.choose(problem()).name == implementations.NAME
    declined = problem(**facts)
    assert registry.choose(declined).name != implementations.NAME
    assert any(row.name == implementations.NAME and reason in text for row, text in registry.why(declined))


def test_without_a_cuda_graph_triton_launches_are_shorter(sm90):
    with torch._inductor.config.patch({"triton.cudagraphs": False}):
        assert registry.choose(problem()).name != implementations.NAME
        (reason,) = (text for row, text in registry.why(problem()) if row.name == implementations.NAME)
        assert "launched from Python" in reason
        assert registry.choose(problem(), name=implementations.NAME).name == implementations.NAME


def test_a_view_that_begins_between_16_bytes_is_declined(sm90):
    weight = torch.empty(8, 64, dtype=torch.uint8)
    assert operand_of_tensor(weight[:, 16:48]).alignment == 16
    found = operand_of_tensor(weight[:, 8:40]).alignment
    assert found == 8 and registry.choose(dataclasses.replace(problem(), alignment=found)).name != implementations.NAME


@pytest.mark.parametrize(("capability", "reason"), [((8, 0), "this GPU has 8.0"), ((10, 0), "this GPU has 10.0")])
def test_other_gpus_are_declined(monkeypatch, capability, reason):
    implementations._device.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert reason in implementations.accepts(problem())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    implementations._device.cache_clear()
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(nvrtc, "library", lambda: None)
    assert "NVRTC of CUDA" in implementations.accepts(problem())
    implementations._device.cache_clear()


def test_operands_that_do_not_fit_are_refused():
    case = product(1, 64, 256, 4)
    with pytest.raises(BadOperand, match="bfloat16 and float16 activations, these are torch.float32"):
        emulated.masked_gemv(case.v.float(), *case.operands[1:])
    with pytest.raises(BadOperand, match=r"expected \(\.\.\., 64\)"):
        emulated.masked_gemv(case.v[:, :32], *case.operands[1:])
    with pytest.raises(BadOperand, match=r"operand bias is \(3,\)"):
        emulated.masked_gemv(case.v, case.tau, case.weight, torch.ones(3), case.scale)
    with pytest.raises(BadOperand, match="and no activation"):
        emulated.masked_gemv(*case.operands, residual=torch.ones(1, 256), activation="silu")
    with pytest.raises(BadOperand, match="two halves that are multiples of 64"):
        narrow = product(1, 64, 320, 4, scale_dtype=torch.float32)
        emulated.masked_gemv(*narrow.operands, activation="silu")
    with pytest.raises(UnknownChoice, match="silu, gelu_tanh"):
        emulated.masked_gemv(*case.operands, activation="tanh")
    with pytest.raises(BadOperand, match="copies scales by 4 bytes"):
        emulated.masked_gemv(*product(1, 64, 320, 4).operands)


def test_configs_are_checked_and_fit():
    with pytest.raises(InvalidOption, match="splits"):
        Config(splits=9)
    for bits, gated in itertools.product((4, 8, 16), (False, True)):
        for ranks, columns in ((4096, 22016), (4096, 12288), (11008, 4096), (64, 64), (28672, 8192)):
            for tokens in (1, 4, 16):
                config = default_config(ranks, columns, tokens, bits=bits, gated=gated)
                assert not gated or config.segments % 2 == 0
                assert config.threads() <= (512 if tokens <= 8 else 256)  # registers
                assert most_shared_bytes(config, ranks, tokens, bits) <= 227 * 1024


@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("ranks", "columns"), [(4096, 28672), (2048, 32768), (4096, 22016)])
def test_all_blocks_of_wide_results_run_at_once(ranks, columns, tokens):
    """At most as many as 128 multiprocessors, eight groups of 16, hold with 512 threads each, or 256 above 8 tokens."""
    config = default_config(ranks, columns, tokens, gated=True)
    at_a_time = (512 if tokens <= 8 else 256) // config.threads()
    of_a_group = 16 * at_a_time // config.splits * config.splits
    assert config.blocks(columns // 2, 4, gated=True) <= 8 * of_a_group
    if tokens == 1:
        assert config.splits == (5 if columns == 22016 else 4)
    # a head of a large vocabulary takes several waves in any case
    assert default_config(ranks, 128256, tokens).splits == default_config(ranks, 256000, tokens).splits


def test_a_kernel_that_cannot_be_compiled_says_why(monkeypatch):
    monkeypatch.setattr(nvrtc, "library", lambda: None)
    with pytest.raises(KernelNotCompiled, match="NVRTC of CUDA .* was not found"):
        nvrtc.compiled("", {}, "sm_90a")


def test_code_is_compiled_once(monkeypatch, tmp_path):
    """A second process finds it; other constants or another source do not."""
    made = []
    monkeypatch.setattr(nvrtc, "library", lambda: ctypes.CDLL(None))
    monkeypatch.setattr(nvrtc, "_version", lambda library: (13, 0))
    monkeypatch.setattr(nvrtc, "_folder", lambda: tmp_path)
    monkeypatch.setattr(nvrtc, "_compile", lambda library, text, options, name: made.append(text) or text.encode())
    for source, constants in (("a", {"B": 1}), ("a", {"B": 1}), ("a", {"B": 2}), ("c", {"B": 1})):
        assert nvrtc.compiled(source, constants, "sm_90a") == f"#define B {constants['B']}\n{source}".encode()
    assert len(made) == 3
