"""The router on tensor cores (kernels/cuda/router.cu): its source under an emulator, launches on a GPU, what it declines."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code

from rana_fx.errors import BadOperand, InvalidOption
from rana_fx.formats import unpack
from rana_fx.kernels import cost, ops, registry
from rana_fx.kernels.cuda import implementations, nvrtc, router_implementations, router_op
from rana_fx.kernels.cuda import router as kernel
from rana_fx.kernels.cuda.router_config import ROWS, RouterConfig, configs, default_config, most_shared_bytes
from rana_fx.kernels.problem import Problem, operand_of_tensor
from rana_fx.passes import lower
from tests.support import emulated
from tests.support.routed import routed

GPU = [pytest.param("cuda", marks=pytest.mark.gpu)]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


# ---- the source under the emulator. A case is one compilation: what a constant decides is in some of them


NORMED = dict(eps=1e-5, gain=BF16)
CASES = {
    "one token, 4 bits": (dict(tokens=1, columns=416, bits=4), RouterConfig(8, 2, 1)),
    "one token, 4 bits, a norm, a ring, a cluster": (
        dict(tokens=1, columns=32 * 37, bits=4, scale_dtype=F32, **NORMED),
        RouterConfig(8, 2, 2, 8),
    ),
    "one token, one group": (dict(tokens=1, columns=32, bits=4), RouterConfig(8, 1, 1)),
    "two tokens, groups of 128": (dict(tokens=2, columns=544, bits=4, group=128, **NORMED), RouterConfig(16, 2, 1, 16)),
    "four tokens, 8 rows": (dict(tokens=4, columns=288, bits=4, eps=0.5), RouterConfig(8, 2, 1)),
    "five tokens, fp16": (dict(tokens=5, columns=544, bits=4, dtype=F16, scale_dtype=F16), RouterConfig(16, 2, 3)),
    "nine tokens, fp16, a gain": (
        dict(tokens=9, columns=544, bits=4, dtype=F16, scale_dtype=F16, eps=1e-5, gain=F16),
        RouterConfig(32, 1, 3, 16),
    ),
    "sixteen tokens, 64 rows": (dict(tokens=16, columns=800, bits=4, group=128, **NORMED), RouterConfig(64, 2, 4)),
    "one token, 8 bits": (dict(tokens=1, columns=208, bits=8, scale_dtype=F32, **NORMED), RouterConfig(8, 2, 1)),
    "one token, 8 bits, 16 columns": (dict(tokens=1, columns=16, bits=8, scale_dtype=F32), RouterConfig(8, 1, 1)),
    "three tokens, 8 bits, a gain in fp32": (
        dict(tokens=3, columns=16 * 13, bits=8, scale_dtype=F32, eps=1e-5, gain=F32),
        RouterConfig(8, 3, 1, 8),
    ),
    "eight tokens, 8 bits, fp16": (
        dict(tokens=8, columns=208, bits=8, dtype=F16, scale_dtype=F32, eps=1e-5),
        RouterConfig(16, 2, 1, 16),
    ),
    "thirteen tokens, 8 bits": (dict(tokens=13, columns=16 * 31, bits=8), RouterConfig(32, 2, 2)),
    "one token, 16 bits": (dict(tokens=1, columns=8 * 61, bits=16, **NORMED), RouterConfig(8, 2, 1, 16)),
    "one token, 16 bits, 8 columns": (dict(tokens=1, columns=8, bits=16), RouterConfig(8, 1, 1)),
    "six tokens, 16 bits, fp16, a gain": (
        dict(tokens=6, columns=200, bits=16, dtype=F16, eps=1e-5, gain=F16),
        RouterConfig(16, 2, 1),
    ),
    "sixteen tokens, 16 bits": (dict(tokens=16, columns=520, bits=16), RouterConfig(16, 3, 2, 8)),
}
EACH = pytest.mark.parametrize("name", CASES)
FEW = settings(max_examples=4, phases=(Phase.explicit, Phase.generate))


@EACH
@FEW
@given(data=st.data())
def test_matches_fp64(name, data):
    """Any number of rows, which may lie apart, in an early launch, which finds x after its wait."""
    facts, config = CASES[name]
    facts = facts | dict(ranks=data.draw(st.sampled_from([1, 7, 8, 9, 17, 31, 64, 97])), seed=data.draw(st.integers(0, 2**16)))
    facts["apart"] = data.draw(st.sampled_from([0, 16, 48]))
    if "gain" in facts:
        facts["offset"] = data.draw(st.sampled_from([0.0, 1.0]))
    case = routed(**facts)
    case.check(emulated.router(*case.operands, **case.norm, config=config, early=True))


@pytest.mark.parametrize("name", ["one token, 4 bits, a norm, a ring, a cluster", "nine tokens, fp16, a gain"])
def test_a_launch_that_is_not_early_has_the_same_bits(name):
    facts, config = CASES[name]
    case = routed(ranks=21, **facts)
    late = emulated.router(*case.operands, **case.norm, config=config)
    assert torch.equal(late, emulated.router(*case.operands, **case.norm, config=config, early=True))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_any_strides_of_activations_gains_and_scales(bits):
    case = routed(3, 11, 224, bits, **NORMED)
    x = torch.zeros(3, 224 * 3, dtype=BF16)[:, ::3].copy_(case.x)
    gain = torch.zeros(224, 2, dtype=BF16)[:, 1].copy_(case.gain)
    scale = None if case.scale is None else torch.stack([case.scale] * 2, -1)[..., 1]
    case = dataclasses.replace(case, x=x, gain=gain, scale=scale)
    case.check(emulated.router(*case.operands, **case.norm, config=RouterConfig(8, 2, 1)))


@pytest.mark.parametrize(("dtype", "size"), [(BF16, 1e17), (BF16, 1e-17), (F16, 6e4), (F16, 1e-5)])
def test_small_and_large_values_with_a_norm_and_a_gain(dtype, size):
    """x times its gain may be beyond fp16."""
    case = routed(2, 9, 256, 4, dtype=dtype, eps=0.0, gain=F32)
    x = (case.x.float().clamp(-2, 2) / 2 * size).to(dtype)
    case = dataclasses.replace(case, x=x, gain=8 * case.gain)
    case.check(emulated.router(*case.operands, **case.norm, config=RouterConfig(8, 2, 1)))


def test_eps_counts_where_the_input_is_small():
    x = torch.full((1, 16), 1e-3).bfloat16()
    eps = 3 * x.double().square().mean().item()
    z = emulated.router(x, torch.eye(16).bfloat16(), eps=eps, config=RouterConfig(16, 1, 1))
    torch.testing.assert_close(z, torch.full_like(x, 0.5), rtol=2**-8, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("odd", [float("inf"), float("nan"), -float("inf")])
def test_what_is_not_finite_is_so_where_it_is_in_the_dense_product(bits, odd):
    """Infinity times a number has its sign, times zero it is NaN; other tokens are as without it."""
    case = routed(3, 40, 128, bits)
    x = case.x.clone()
    x[0, 5] = odd
    z = emulated.router(x, *case.operands[1:], config=RouterConfig(8, 2, 1))
    exact = x.double() @ unpack(case.weight, case.scale, torch.float64).t()
    assert torch.equal(z.isnan(), exact.isnan())
    assert torch.equal(z[exact.isinf()].double(), exact[exact.isinf()])
    dataclasses.replace(case, x=case.x[1:]).check(z[1:])


# ---- on a GPU


@pytest.mark.parametrize("device", GPU, indirect=True)
@settings(max_examples=25)
@given(data=st.data())
def test_a_launch_matches_fp64(device, data):
    bits, dtype = data.draw(st.sampled_from([4, 8, 16])), data.draw(st.sampled_from([BF16, F16]))
    tokens, columns = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 140)) * 128 // bits
    normed = data.draw(st.booleans())
    case = routed(
        tokens,
        data.draw(st.sampled_from([1, 8, 97, 512, 2800])),
        columns,
        bits,
        dtype=dtype,
        group=data.draw(st.sampled_from([64, 128])),
        scale_dtype=data.draw(st.sampled_from([F32, BF16])),
        eps=1e-5 if normed else None,
        gain=data.draw(st.sampled_from([None, BF16, F32])) if normed else None,
        offset=1.0 if normed else 0.0,
        apart=data.draw(st.sampled_from([0, 16])),
        seed=data.draw(st.integers(0, 99)),
    ).to(device)
    rows = data.draw(st.sampled_from([n for n in ROWS if n > 8 or tokens <= 4]))
    config = RouterConfig(rows, data.draw(st.sampled_from([1, 4, 8])), data.draw(st.sampled_from([1, 2, 5])))
    config = data.draw(st.sampled_from([None, config]))
    z = kernel.router(*case.operands, **case.norm, config=config)
    case.check(z)
    for early in (False, True):
        assert torch.equal(z, kernel.router(*case.operands, **case.norm, config=config, early=early))


@pytest.mark.parametrize("device", GPU, indirect=True)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_opcheck(device, bits):
    fields = list(dataclasses.astuple(default_config(64, 512, 2, bits=bits)))
    for facts in (dict(), NORMED, dict(eps=1e-6)):
        case = routed(2, 64, 512, bits, **facts).to(device)
        operands = (case.x, case.gain, case.weight, case.scale, case.eps, case.offset, fields, False)
        torch.library.opcheck(router_op.router_tensor_cores, operands)


@pytest.mark.parametrize("device", GPU, indirect=True)
@pytest.mark.parametrize("bits", [4, 16])
def test_compiled_graphs_launch_it(device, bits):
    """In a CUDA graph, with the norm in front fused; the result is the eager launch's to the bit. One token is Triton's."""
    case = routed(2, 512, 1024, bits, **NORMED).to(device)

    def step(h):
        h = h * 2
        return ops.normed_router(h, case.gain, case.weight, case.scale, case.eps, 0.0)

    lower.register()
    wanted = kernel.router(case.x * 2, *case.operands[1:], **case.norm)
    compiled = torch.compile(step, mode="reduce-overhead")
    _, (code, *_) = run_and_get_code(compiled, case.x)
    assert "router_tensor_cores" in code
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(compiled(case.x), wanted)


# ---- what is declined


@pytest.fixture
def sm90(monkeypatch):
    monkeypatch.setattr(cost, "nearest", lambda device: cost.H200)
    monkeypatch.setattr(router_implementations, "_device", lambda device: None)
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        yield


def problem(**facts):
    made = Problem("router", torch.device("cuda"), BF16, 2, 2, 2816, 4096, torch.uint8, 4, density=1.0)
    return dataclasses.replace(made, **facts)


@pytest.mark.parametrize("op", ["router", "normed_router"])
@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (dict(tokens=17), "17 tokens, it takes 1 to 16"),
        (dict(tokens=1), "one token, whose products the Triton kernel computes"),
        (dict(tokens=None), "sizes vary"),
        (dict(dtype=F32), "not torch.float32 by torch.uint8"),
        (dict(stored=F16, bits=16), "not torch.bfloat16 by torch.float16"),
        (dict(columns=4096 + 16), "4112 columns in 4 bits are not made of aligned 16 bytes"),
        (dict(contiguous_rows=False), "not made of aligned 16 bytes"),
        (dict(alignment=8), "not made of aligned 16 bytes"),
        (dict(tokens=16, columns=2**17), "16 tokens of 131072 columns need"),
    ],
)
def test_what_is_declined_and_why(sm90, op, facts, reason):
    for stored, bits in ((torch.uint8, 4), (torch.int8, 8), (BF16, 16)):
        assert registry.choose(problem(op=op, stored=stored, bits=bits)).name == implementations.NAME
    declined = problem(op=op, **facts)
    assert registry.choose(declined).name != implementations.NAME
    assert any(row.name == implementations.NAME and reason in text for row, text in registry.why(declined))


def test_without_a_cuda_graph_triton_launches_are_shorter(sm90):
    with torch._inductor.config.patch({"triton.cudagraphs": False}):
        assert registry.choose(problem()).name != implementations.NAME
        (reason,) = (text for row, text in registry.why(problem()) if row.name == implementations.NAME)
        assert "launched from Python" in reason


def test_a_view_that_begins_between_16_bytes_is_declined(sm90):
    found = operand_of_tensor(torch.empty(8, 64, dtype=torch.uint8)[:, 8:40]).alignment
    assert found == 8 and registry.choose(problem(alignment=found)).name != implementations.NAME


@pytest.mark.parametrize(("capability", "reason"), [((8, 0), "this GPU has 8.0"), ((10, 0), "this GPU has 10.0")])
def test_other_gpus_are_declined(monkeypatch, capability, reason):
    router_implementations._device.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert reason in router_implementations.accepts(problem())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    router_implementations._device.cache_clear()
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(nvrtc, "library", lambda: None)
    found = router_implementations.accepts(problem())
    assert "router.cu" in found and "NVRTC of CUDA" in found
    router_implementations._device.cache_clear()


def test_operands_that_do_not_fit_are_refused():
    case = routed(1, 16, 128, 4)
    with pytest.raises(BadOperand, match="bfloat16 and float16 activations, these are torch.float32"):
        emulated.router(case.x.float(), *case.operands[1:])
    with pytest.raises(BadOperand, match="in the activations' dtype, this is torch.float16"):
        emulated.router(case.x, torch.ones(16, 128).half())
    with pytest.raises(BadOperand, match=r"expected \(\.\.\., 128\)"):
        emulated.router(case.x[:, :64], *case.operands[1:])
    with pytest.raises(BadOperand, match=r"expected \(128,\)"):
        emulated.router(*case.operands, gain=torch.ones(3), eps=1e-5)
    with pytest.raises(BadOperand, match="an eps"):
        emulated.router(*case.operands, gain=torch.ones(128))
    with pytest.raises(BadOperand, match="rows of 112 columns, 56 bytes apart, are not made"):
        emulated.router(*routed(1, 16, 112, 4).operands)
    with pytest.raises(InvalidOption, match="16, 32 or 64 for 5 tokens"):
        emulated.router(*routed(5, 16, 128, 4).operands, config=RouterConfig(8, 1, 1))


def test_configs_are_checked_and_fit():
    for bad in (dict(rows=24), dict(warps=17), dict(splits=9), dict(held=2)):
        with pytest.raises(InvalidOption, match=next(iter(bad))):
            RouterConfig(**bad)
    for bits in (4, 8, 16):
        for ranks, columns in ((2816, 4096), (976, 4096), (4096, 11008), (1, 32), (28672, 8192)):
            for tokens in (1, 2, 4, 5, 8, 16):
                found = configs(ranks, columns, tokens, bits=bits)
                assert found[0] == default_config(ranks, columns, tokens, bits=bits) and 1 <= len(set(found)) == len(found) <= 16
                assert all(tokens <= 4 or config.rows > 8 for config in found)
                assert all(most_shared_bytes(config, columns, tokens, bits) <= 227 * 1024 for config in found)
