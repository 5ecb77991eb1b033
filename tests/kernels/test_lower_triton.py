"""Code that Inductor generates for a GPU, without one: the kernels that a decoded token launches, and fusions; on a GPU, also
their
results."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import silu

from rana_fx.formats import pack, unpack
from rana_fx.kernels import autotune as tune
from rana_fx.kernels import reference
from rana_fx.kernels.cuda.router_config import default_config as router_config
from rana_fx.kernels.ops import masked_gemv, masked_rows, router
from rana_fx.kernels.triton.config import configs
from rana_fx.passes import lower
from tests.support.uninterpreted import run

pytest.importorskip("triton")


def launches(code):
    """Names of the kernels that the generated module calls, in order."""
    return re.findall(r"^\s+(\w+?)(?:_\d+)?\.run\(|^\s+(extern_kernels\.\w+)\(", code[code.index("def call") :], re.M)


def options(code):
    """Constants of the kernel and compiler options of each of our launches, in order."""
    body = code[code.index("def call") :]
    order = [name for name in re.findall(r"^\s+(\w+)\.run\(", body, re.M) if not name.startswith("triton")]
    sources = re.split(r"^(\w+) = async_compile\.triton\(", code, flags=re.M)
    metas = {name: re.search(r"triton_meta=(\{.*)", source)[1] for name, source in zip(sources[1::2], sources[2::2], strict=True)}
    return [dict(re.findall(r"'(\w+)': (True|False|\d+)\b", metas[name])) for name in order]


REQUESTS = ("1,1,ranks", "1,3,ranks", "64,1,ranks", "1,2,masks", "1,2,gate", "4,1,gate", "1,2,attention", "3,2,packed")
REQUESTS += ("1,2,ranks,graphs", "1,1,masks,graphs")


@pytest.fixture(scope="module")
def written():
    """Generated code by tokens, layers and kind."""
    rows = map(json.loads, run("tests/support/lowered.py", *REQUESTS).splitlines())
    return {row["request"]: row["code"] for row in rows}


def test_a_decoded_token_launches_one_kernel_per_product_and_nothing_else(written):
    code = written["1,1,ranks"]
    names = [first or second for first, second in launches(code)]
    assert [name for name in names if not name.startswith("triton")] == ["router_kernel", *["masked_gemv_kernel"] * 2]
    # the one other kernel zeroes the counters
    (fill,) = (name for name in names if name.startswith("triton"))
    assert re.search(rf"def {fill}\w*\(out_ptr0, xnumel", code)
    router, first, second = options(code)
    assert (router["NORM"], router["HAS_GAIN"]) == ("True", "True")
    assert (first["ACT"], first["HAS_RESIDUAL"]) == ("1", "False")
    assert (second["ACT"], second["HAS_RESIDUAL"]) == ("0", "True")
    # the kernel before the first launch of a graph is unknown
    assert [launch["PDL"] for launch in (router, first, second)] == ["False", "True", "True"]
    assert [launch.get("launch_pdl", "False") for launch in (router, first, second)] == ["False", "True", "True"]


def test_layers_that_are_alike_share_what_is_traced_and_not_what_is_launched(written):
    code = written["1,3,ranks"]
    ours = [first for first, _ in launches(code) if first.startswith(("router", "masked_gemv"))]
    assert ours == ["router_kernel", "masked_gemv_kernel", "masked_gemv_kernel"] * 3
    # one fill of counters for all, and two kernels of each kind at most: the first launch of the graph does not start early
    assert len(launches(code)) - len(ours) == 1
    assert len(re.findall(r"^router_kernel\w* = async_compile", code, re.M)) <= 2


def test_masks_of_one_tensor_are_one_launch(written):
    code = written["1,2,masks"]
    ours = [first for first, _ in launches(code) if first.startswith("masked")]
    assert ours == ["masked_parts_kernel", "masked_gemv_kernel"] * 2
    first, second, *_ = options(code)
    assert (first["PDL"], second["PDL"]) == ("True", "True")
    # no weight is copied, and both halves are read from the output of the launch
    assert not re.search(
        r"\(4096, 11008\)|\(11008, 4096\)", "".join(line for line in code.splitlines() if "empty_strided" in line)
    )


def on_tensor_cores(code):
    """The operation and the arguments of each launch on tensor cores, in order."""
    return re.findall(r"= torch\.ops\.rana\.(\w+_tensor_cores)\.default\((.*)\)$", code, re.M)


def test_code_that_cuda_graphs_repeat_multiplies_16_bits_on_tensor_cores(written):
    """Gated, with a residual, and several weights; each starts early, after another launch of the graph."""
    code = written["1,2,ranks,graphs"]
    calls = on_tensor_cores(code)
    assert [name for name, _ in calls] == ["masked_gemv_tensor_cores"] * 4 and "masked_gemv_kernel" not in code
    assert ["'silu'" in given for _, given in calls] == [True, False] * 2
    # of the second layer the residual is a result of the first
    residual, no_activation_or_norm = r"None, None, (reinterpret_tensor\(\w+|\w+), .*", r"None, None, None, 0\.0, \["
    assert all(re.search(residual + no_activation_or_norm, given) for _, given in calls[1::2])
    assert all(given.endswith("True") for _, given in calls)
    code = written["1,1,masks,graphs"]
    (first, given), (second, _) = on_tensor_cores(code)
    assert (first, second) == ("masked_gemv_parts_tensor_cores", "masked_gemv_tensor_cores")
    # no weight is copied
    assert given.count("reinterpret_tensor") >= 2 and not re.search(r"empty_strided\w*\(\(4096, 11008\)", code)


def test_a_masked_gate_reads_kept_rows_of_up_and_down(written):
    code = written["1,2,gate"]
    names = [first or second for first, second in launches(code)]
    ours = [name for name in names if not name.startswith("triton")]
    # the matmul of the gate is dense, and its output masks the others
    assert ours == ["extern_kernels.mm", "masked_rows_kernel", "masked_gemv_kernel"] * 2
    assert [launch["PDL"] for launch in options(code)] == ["True"] * 4
    assert [launch.get("launch_pdl") for launch in options(code)] == ["True"] * 4
    assert [launch.get("HAS_RESIDUAL") for launch in options(code)] == [None, "True"] * 2
    assert not re.search(r"empty_strided\w*\(\((4096, 11008|11008, 4096)\)", code)


def test_attention_is_one_launch_that_reads_the_cache(written):
    code = written["1,2,attention"]
    ours = [first for first, _ in launches(code) if first and not first.startswith("triton")]
    assert ours == ["router_kernel", "masked_gemv_kernel", "decode_attention_kernel"] * 2
    # neither a repeated head nor a mask of each head is in memory
    assert "1536" not in "".join(line for line in code.splitlines() if "empty_strided" in line)
    attention = options(code)[2]
    assert (attention["PDL"], attention["launch_pdl"], attention["MASK"]) == ("True", "True", "1")


def test_a_packed_router_on_tensor_cores_is_a_call_with_the_norm_in_it(written):
    """It starts early where the kernel before it is one of this graph."""
    code = written["3,2,packed"]
    calls = re.findall(r"rana\.router_tensor_cores\.default\((.*)\)", code)
    given = [re.search(r", (1e-05), (0\.0), \[([\d, ]+)\], (True|False)$", call) for call in calls]
    assert [(call[1], call[2], call[4]) for call in given] == [("1e-05", "0.0", "False"), ("1e-05", "0.0", "True")]
    config = dataclasses.astuple(router_config(2800, 4096, 3, bits=4))
    assert all(tuple(map(int, call[3].split(","))) == config for call in given)
    assert "router_kernel" not in code


def test_masks_that_cover_too_much_are_dense_products_of_up(written):
    names = [first or second for first, second in launches(written["4,1,gate"])]
    assert not any(name.startswith("masked_rows") for name in names)
    assert sum("extern" in name or "tem" in name for name in names) >= 2


def test_many_tokens_are_dense_products(written):
    names = [first or second for first, second in launches(written["64,1,ranks"])]
    assert not any(name.startswith(("router", "masked_gemv")) for name in names)
    assert sum("extern" in name or "tem" in name for name in names) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 3])
def test_compiled_layer_matches_fp64(tokens, dtype):
    ranks, width, ffn = 1000, 2048, 4096
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*size, scale=1.0):
        return (torch.randn(size, generator=generator, device="cuda") * scale).to(dtype)

    x, r = randn(1, tokens, width), randn(1, tokens, width)
    b, w, w2 = (
        randn(ranks, width, scale=width**-0.5),
        randn(ranks, 2 * ffn, scale=ranks**-0.5),
        randn(ffn, width, scale=ffn**-0.5),
    )
    bias = randn(2 * ffn)
    tau, tau2 = torch.full((ranks,), 0.5, device="cuda"), torch.full((ffn,), 0.02, device="cuda")

    def layer(x, r):
        z = router(x, b)
        y = masked_gemv(z, tau, w, bias)
        gate, up = y.chunk(2, -1)
        h = silu(gate) * up
        return z, y, h, r + masked_gemv(h, tau2, w2)

    lower.register()
    (z, y, h, out), (code, *_) = run_and_get_code(torch.compile(layer), x, r)
    eps = torch.finfo(dtype).eps
    if tokens == 1:
        assert code.count("def masked_gemv_kernel") >= 1
    assert _rmse(z, x.double() @ b.double().t()) < 2 * eps + 1e-6
    assert _rmse(y, reference.masked_gemv(z.double(), tau, w.double(), bias.double())) < 2 * eps + 1e-6
    gate, up = y.double().chunk(2, -1)
    # fused, the activation sees sums that were not rounded yet
    assert _rmse(h, silu(gate) * up) < 6 * eps + 1e-6
    right = r.double() + reference.masked_gemv(h.double(), tau2, w2.double())
    assert _rmse(out, right) < 2 * eps + _flipped(h, tau2, w2, eps)
    again = torch.compile(layer)(x, r)
    assert all(torch.equal(one, two) for one, two in zip((z, y, h, out), again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 2])
def test_compiled_masked_gate_matches_fp64(tokens, bias, dtype):
    width, ffn, density = 2048, 4096, 0.2
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*size, scale=1.0):
        return (torch.randn(size, generator=generator, device="cuda") * scale).to(dtype)

    x, r = randn(1, tokens, width), randn(1, tokens, width)
    w_g, w_u = randn(ffn, width, scale=width**-0.5), randn(ffn, width, scale=width**-0.5)
    w2, c = randn(ffn, width, scale=ffn**-0.5), randn(ffn) if bias else None
    # about a fifth of the gates reach the threshold
    level, tiny = 0.46**2, torch.full((ffn,), torch.finfo(torch.float32).tiny, device="cuda")

    def layer(x, r):
        gate = silu(torch.nn.functional.linear(x, w_g))
        gate = torch.where(gate.float().square() >= level, gate, 0.0)
        h = masked_rows(x, gate, w_u, c, density)
        return gate, h, r + masked_gemv(h, tiny, w2, None, None, density)

    lower.register()
    (gate, h, out), (code, *_) = run_and_get_code(torch.compile(layer), x, r)
    assert "def masked_rows_kernel" in code
    assert 0.1 < float((gate != 0).float().mean()) < 0.35
    eps = torch.finfo(dtype).eps
    exact = reference.masked_rows(x.double(), gate.double(), w_u.double(), None if c is None else c.double())
    assert _rmse(h, exact) < 2 * eps + 1e-6
    assert _rmse(out, r.double() + reference.masked_gemv(h.double(), tiny, w2.double())) < 2 * eps + 1e-6
    again = torch.compile(layer)(x, r)
    assert all(torch.equal(one, two) for one, two in zip((gate, h, out), again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [16, 8])
def test_max_autotune_measures_a_shape_once_and_computes_the_same(bits, tmp_path, monkeypatch):
    ranks, width = 2048, 8192
    generator = torch.Generator("cuda").manual_seed(0)
    v, w = (torch.randn(size, generator=generator, device="cuda").bfloat16() for size in ((1, ranks), (ranks, width)))
    stored, scale = (w, None) if bits == 16 else pack(w, bits)
    tau = torch.full((ranks,), 0.455, device="cuda")
    file, measured = tmp_path / "tuned.json", []
    monkeypatch.setattr(tune, "_file", lambda: file)
    microseconds = tune.microseconds

    def counted(calls):
        measured.append(microseconds(calls))
        return measured[-1]

    monkeypatch.setattr(tune, "microseconds", counted)
    lower.register()

    def layer(v):
        y = masked_gemv(v * 2, tau, stored, None, scale)
        return y, masked_gemv(y[:, :ranks] * 2**-5, tau, stored, None, scale)

    y, z = torch.compile(layer, mode="max-autotune-no-cudagraphs")(v)
    exact = w.double() if bits == 16 else unpack(stored, scale, torch.float64)
    eps = torch.finfo(torch.bfloat16).eps
    assert _rmse(y, reference.masked_gemv(v.double() * 2, tau, exact)) < 2 * eps
    assert _rmse(z, reference.masked_gemv(y[:, :ranks].double() * 2**-5, tau, exact)) < 2 * eps
    known = json.loads(file.read_text())
    assert len(known) == 1  # both matmuls are in one bucket
    assert len(measured) == len(configs(ranks, width, 1, 0.5, bits=bits))
    assert all(0 < time < 1e3 for time in measured)
    torch.compiler.reset()
    again = torch.compile(layer, mode="max-autotune-no-cudagraphs")(v)
    assert len(measured) == len(configs(ranks, width, 1, 0.5, bits=bits)), "remembered configs were measured again"
    assert torch.equal(y, again[0]) and torch.equal(z, again[1])


def _rmse(got, exact):
    return float((got.double() - exact).norm() / exact.norm())


def _flipped(h, tau, w, eps):
    """Largest effect of elements within rounding of their threshold: the fused matmul reads h before rounding."""
    near = (h.double().square() - tau).abs() < 4 * eps * tau
    delta = reference.masked_gemv(h.double() * near, tau * 0, w.double())
    return float(delta.norm() / math.sqrt(h.shape[-2])) + 1e-6
