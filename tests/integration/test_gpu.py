"""All steps on a CUDA device: adapt, compile with and without CUDA graphs, train, generate."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import rana_fx
from rana_fx.evaluation.measure import measuring
from rana_fx.passes.runner import run
from tests.support.architectures import build, ids, output
from tests.support.exact import plan_for

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def adapted(dtype=torch.float32, recipe="paper"):
    model, batch = build("llama", 2)
    model = model.to("cuda", dtype)
    batches = [batch, *(ids() for _ in range(4))]
    rana_fx.adapt(model, batches, budget=0.85, recipe=recipe, progress=False)
    return model, {key: value.cuda() for key, value in batch.items()}


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("recipe", ["rana", "paper", "static", "cats", "teal", "wina"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_equals_reference(recipe, mode):
    model, batch = adapted(recipe=recipe)
    with measuring(model) as meter:
        expected = output(meter.run(batch)).clone()
    compiled = torch.compile(model, backend=rana_fx.backend, mode=mode)
    with torch.no_grad():
        for _ in range(3):  # CUDA graphs record on the second call and replay on the third
            got = output(compiled(**batch)).clone()
    assert relative(got, expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoded_token_of_a_gated_plan_reads_kept_rows(dtype):
    model, batch = adapted(dtype, recipe="cats")
    batch = {key: value[:1, :1] for key, value in batch.items()}
    with measuring(model) as meter:
        expected = output(meter.run(batch)).clone()
    with torch.no_grad():
        got, (code, *_) = run_and_get_code(torch.compile(model, backend=rana_fx.backend), **batch)
    # one kernel per layer, or one for all equal layers
    assert "def masked_rows_kernel" in code and code.count("masked_rows_kernel") > 2
    # in bf16 a gate within rounding of its threshold may fall on either side
    assert relative(output(got), expected) < (1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoded_token_computes_large_outputs_by_their_rows(dtype):
    model, batch = build("gpt_neox", 2)
    model = model.to(dtype)
    plan = plan_for(model, batch, ("dense_h_to_4h",), ranks=8)
    rana_fx.attach(model.to("cuda"), plan)
    batch = {key: value[:1, :1].cuda() for key, value in batch.items()}
    with measuring(model) as meter:
        expected = output(meter.run(batch)).clone()
    assert all(0 < share < 1 for share in meter.result().exact_density.values())
    with torch.no_grad():
        got, (code, *_) = run_and_get_code(torch.compile(model, backend=rana_fx.backend), **batch)
    assert "def masked_rows_kernel" in code and code.count("masked_rows_kernel") > 2
    # in bf16 an output within rounding of its threshold may fall on either side
    assert relative(output(got), expected) < (1e-4 if dtype == torch.float32 else 0.1)


def test_bfloat16():
    # a recipe without masks: in bf16 a z^2 within rounding of its threshold may fall on either side
    model, batch = adapted(torch.bfloat16, recipe="static")
    with measuring(model) as meter:
        expected = output(meter.run(batch))
    with torch.no_grad():
        got = output(torch.compile(model, backend=rana_fx.backend)(**batch))
    assert relative(got, expected) < 0.05


def test_gradients():
    model, batch = adapted()

    def reference(gm, example_inputs):
        run(gm, example_inputs)
        return gm.forward

    output(torch.compile(model, backend=reference)(**batch)).square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compiler.reset()
    output(torch.compile(model, backend=rana_fx.backend)(**batch)).square().mean().backward()
    for name, grad in grads.items():
        assert relative(dict(model.named_parameters())[name].grad, grad) < 1e-3, name


def test_generate_with_the_frameworks_own_compile_config():
    from transformers import CompileConfig

    model, _ = adapted()
    prompt = torch.randint(3, 90, (1, 6), device="cuda")
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "cache_implementation": "static",
        "pad_token_id": 0,
        "eos_token_id": None,
    }

    def reference(gm, example_inputs):
        run(gm, example_inputs)
        return gm.forward

    # prefill runs eagerly, so dense, under CompileConfig; only decode is compiled
    expected = model.generate(prompt, compile_config=CompileConfig(backend=reference, mode=None), **settings)
    torch.compiler.reset()
    got = model.generate(prompt, compile_config=CompileConfig(backend=rana_fx.backend, mode="reduce-overhead"), **settings)
    assert torch.equal(got, expected)
