"""Training an adapted model: which gradients there are and that they are right, export, LoRA, the loop, thresholds, errors."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

import rana_fx
from rana_fx._backend import rewrite
from rana_fx.attachment import attached
from rana_fx.errors import (
    CheckpointError,
    InvalidOption,
    LossNotFinite,
    NoBatches,
    NoPlan,
    NothingToTrain,
    UnknownChoice,
    UnknownTarget,
)
from rana_fx.evaluate import evaluate
from rana_fx.measure import measuring
from rana_fx.training import Settings, add_lora, best_rate, loop, merge_lora, rethreshold, train, trainable, trained_plan
from tests.architectures import build, ids, output

EPS = torch.finfo(torch.float32).eps


def eager(gm, example_inputs):
    """The backend without Inductor: autograd of the ops runs as they are called."""
    rewrite(gm, example_inputs)
    return gm.forward


def adapted(recipe="paper", depth=2, budget=0.7, dtype=torch.float32):
    model, batch = build("llama", depth)
    model = model.to(dtype)
    rana_fx.adapt(model, [batch, *(ids() for _ in range(4))], budget=budget, recipe=recipe, progress=False)
    return model, batch


def compiled(model, how=eager):
    torch._dynamo.reset()
    return torch.compile(model, backend=how)


def gradients(model, forward, batch):
    model.zero_grad()
    loss = output(forward(**batch, use_cache=False)).square().mean()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(loss.detach()), found


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


class Site(nn.Module):
    """One linear of an adapter as the paper writes it, apart from everything that rewrites graphs."""

    def __init__(self, adapter, factors, index, span, linear):
        super().__init__()
        self.span, self.masked = span, adapter.weight is not None
        self.linear = linear
        self.factors, self.index = [factors], index

    def forward(self, x):
        factor = lambda key: getattr(self.factors[0], f"a{self.index}_{key}", None)  # noqa: E731
        v = x if factor("router") is None else x @ factor("router").t()
        v = v * (v.detach().float().square() >= factor("tau")).to(v.dtype)
        if not self.masked:
            return v @ self.linear.weight.t() + (0 if self.linear.bias is None else self.linear.bias)
        y = v @ factor("weight") + (0 if factor("bias") is None else factor("bias"))
        return y[..., self.span[0] : self.span[1]]


def reference(model):
    """A copy in fp64 that computes the plan by ordinary modules; its parameters have the names of the adapted model's."""
    twin = copy.deepcopy(model).double()
    found = attached(twin)
    sizes = {record.name: record.out_features for record in found.plan.sites}
    for index, adapter in enumerate(found.plan.adapters):
        start = 0
        for site in adapter.sites:
            name = site.removesuffix(".weight")
            span = (start, start + sizes[site])
            twin.set_submodule(name, Site(adapter, found.factors, index, span, twin.get_submodule(name)))
            start += sizes[site]
    return twin


@pytest.mark.parametrize("recipe", ["paper", "static", "teal", "wina"])
def test_gradients_equal_those_of_the_written_out_model(recipe):
    model, batch = adapted(recipe)
    trainable(model, what="all")
    twin = reference(model)
    expected_loss, expected = gradients(twin, twin, batch)
    expected = {name.replace(".linear.", "."): grad for name, grad in expected.items()}
    # in fp64 masks are those of the reference, and only the order of sums differs
    double = copy.deepcopy(model).double()
    loss, got = gradients(double, compiled(double), batch)
    assert got.keys() == expected.keys() and any(name.startswith("rana_fx.") for name in got) == (recipe in ("paper", "static"))
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for name, grad in got.items():
        assert relative(grad, expected[name]) < 1e-9, name
    # in fp32 too, as far as no z^2 lies within rounding of its threshold: hence the share of gradients, not every one
    _, single = gradients(model, compiled(model), batch)
    worst = sorted(relative(single[name], expected[name]) for name in single)
    assert worst[len(worst) // 2] < 1e5 * EPS


@pytest.mark.slow
def test_gradients_through_inductor():
    model, batch = adapted(depth=1, recipe="static")
    _, expected = gradients(model, compiled(model), batch)
    _, got = gradients(model, compiled(model, "rana"), batch)
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        assert relative(grad, expected[name]) < 1e4 * EPS, name


def test_what_is_trained():
    model, batch = adapted()
    factors = trainable(model)
    assert {name for name in factors if not name.startswith("rana_fx.")} == {
        f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)
    }
    assert {name.rpartition("_")[2] for name in factors if name.startswith("rana_fx.")} == {"router", "weight"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(factors)
    _, got = gradients(model, compiled(model), batch)
    assert set(got) == set(factors)
    everything = trainable(model, what="all")
    assert set(factors) < set(everything)
    # what factors stand for is not read, and not trained
    assert not any("q_proj" in name or "gate_proj" in name for name in everything)
    _, got = gradients(model, compiled(model), batch)
    assert set(got) == set(everything)


def test_compiled_code_notices():
    model, batch = adapted()
    trainable(model)
    forward = compiled(model)
    _, got = gradients(model, forward, batch)
    assert "rana_fx.a0_router" in got
    only_dense = next(name for name in trainable(model, what="all") if name.endswith("norm.weight"))
    _, got = gradients(model, forward, batch)
    assert {"rana_fx.a0_router", only_dense} <= set(got)
    trainable(model)
    assert only_dense not in gradients(model, forward, batch)[1]


def checkpointing(model):
    model.train()
    model.activation_checkpointing_enable() if hasattr(model, "activation_checkpointing_enable") else (
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    )


def test_gradient_checkpointing_trains_the_same_and_keeps_less():
    model, batch = adapted()
    kept = []

    def how(gm, example_inputs):
        rewrite(gm, example_inputs)

        def partition(joint, inputs, **kwargs):
            forward, backward = min_cut_rematerialization_partition(joint, inputs, **kwargs)
            kept.append(len(forward.graph.output_node().args[0]))
            return forward, backward

        nop = lambda graph, _: make_boxed_func(graph.forward)  # noqa: E731
        return aot_autograd(fw_compiler=nop, bw_compiler=nop, partition_fn=partition)(gm, example_inputs)

    model.train()
    loss, expected = gradients(model, compiled(model, how), batch)
    checkpointing(model)
    other, got = gradients(model, compiled(model, how), batch)
    assert other == pytest.approx(loss, rel=1e-6) and got.keys() == expected.keys()
    assert "rana_fx.a0_router" in got
    for name, grad in got.items():
        assert relative(grad, expected[name]) < 1e4 * EPS, name
    # per layer only what enters it, as PyTorch's own checkpoints of the dense model keep
    assert kept[1] < kept[0]


def test_a_model_compiled_in_place_trains():
    """What the Trainer of transformers, and any other loop that calls the model, gets after ``model.compile(backend="rana")``."""
    model, batch = adapted(depth=1)
    chosen = trainable(model)
    _, expected = gradients(model, compiled(model), batch)
    torch._dynamo.reset()
    model.compile(backend=eager)
    _, got = gradients(model, model, batch)
    assert set(got) == set(chosen)
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[name])
    losses = train(model, texts(4), settings=SETTINGS, progress=False).losses
    assert len(losses) == 2 and trained_plan(model).digest() != attached(model).plan.digest()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_trainer_of_transformers(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model, _ = adapted(depth=1)
    trainable(model)
    model.compile(backend="rana")
    rows = [{"input_ids": row, "labels": row} for batch in texts(4) for row in batch["input_ids"]]
    settings = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True
    )
    Trainer(model, settings, train_dataset=rows).train()
    assert trained_plan(model).digest() != attached(model).plan.digest()


def test_autocast_trains_fp32_factors():
    model, batch = adapted(recipe="static")
    _, expected = gradients(model, compiled(model), batch)
    with torch.autocast("cpu", torch.bfloat16):
        _, got = gradients(model, compiled(model), batch)
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        assert grad.dtype == torch.float32 and relative(grad, expected[name]) < 0.1, name


def test_trained_plan_is_what_the_model_computes(tmp_path):
    model, batch = adapted()
    old = attached(model).plan
    chosen = trainable(model, what="all")
    optimizer = torch.optim.AdamW(chosen.values(), lr=1e-2)
    forward = compiled(model)
    for _ in range(2):
        output(forward(**batch, use_cache=False)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        expected = output(forward(**batch)).clone()
    plan = trained_plan(model)
    assert plan.digest() != old.digest() and all(adapter.error is None for adapter in plan.adapters if adapter.kind == "rank")
    assert plan.expected_budget() == old.expected_budget()
    factor = attached(model).tensor(0, "router")
    assert torch.equal(plan.adapters[0].router, factor) and not torch.equal(plan.adapters[0].router, old.adapters[0].router)
    plan.save(tmp_path / "plan")
    with torch.no_grad():
        factor.zero_()  # the plan holds copies
    again = rana_fx.load_plan(tmp_path / "plan")
    assert again.digest() == plan.digest()
    rana_fx.detach(model)
    rana_fx.attach(model, again)
    with torch.no_grad():
        torch.testing.assert_close(output(compiled(model)(**batch)), expected, rtol=0, atol=0)


def test_an_untrained_plan_keeps_its_digest_and_a_cast_one_fits():
    model, _ = adapted()
    old = attached(model).plan
    assert trained_plan(model).digest() == old.digest()
    model.bfloat16()
    plan = trained_plan(model)
    assert {record.dtype for record in plan.sites} == {"bfloat16"} and plan.adapters[0].router.dtype == torch.bfloat16
    assert plan.expected_budget("bytes") == pytest.approx(old.expected_budget("bytes"))
    rana_fx.attach(model, plan)


def test_lora_starts_as_the_plan_trains_alone_and_merges_exactly():
    model, batch = adapted(dtype=torch.float64)
    model.eval()
    forward = compiled(model)
    with torch.no_grad():
        before, dense = output(forward(**batch)).clone(), output(model(**batch)).clone()
    added = add_lora(model, rank=4, alpha=16)
    names = {name.removeprefix("rana_fx.lowrank.").rpartition("/")[0] for name in added}
    assert {"rana_fx/a0_router", "rana_fx/a0_weight", "model/layers/0/self_attn/o_proj/weight", "lm_head/weight"} <= names
    assert not any("q_proj" in name for name in names)
    with torch.no_grad():
        torch.testing.assert_close(output(forward(**batch)), before, rtol=0, atol=1e-12)
    _, got = gradients(model, forward, batch)
    assert set(got) == set(added)
    optimizer = torch.optim.AdamW(added.values(), lr=1e-2)
    for _ in range(3):
        output(forward(**batch, use_cache=False)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained = output(forward(**batch)).clone()
        torch.testing.assert_close(output(model(**batch)), dense, rtol=0, atol=0)  # eager: the dense model, untouched
    assert relative(trained, before) > 1e-4
    old = attached(model).plan
    plan = trained_plan(model)
    assert plan.digest() != old.digest() and not any("lowrank" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        assert relative(output(forward(**batch)), trained) < 1e-6  # up and down are fp32
        rana_fx.attach(model, plan)
        assert relative(output(forward(**batch)), trained) < 1e-6


def test_lora_gradients_are_those_of_the_matrix():
    """d/d up of f(W + s up down) is s G down^T, with G the gradient of W."""
    model, batch = adapted(dtype=torch.float64)
    trainable(model, what="all")
    forward = compiled(model)
    _, matrices = gradients(model, forward, batch)
    add_lora(model, rank=3, alpha=6, targets=["rana_fx.a0_*", "*.o_proj.weight"])
    _, got = gradients(model, forward, batch)
    module = attached(model).factors.lowrank
    assert len(got) == 2 * (2 + 2)
    for name in ("rana_fx.a0_router", "rana_fx.a0_weight", "model.layers.1.self_attn.o_proj.weight"):
        key = name.replace(".", "/")
        expected = 6 / 3 * matrices[name] @ module.get_parameter(f"{key}/down").double().t()
        assert relative(got[f"rana_fx.lowrank.{key}/up"], expected.detach()) < 1e-5, name


def test_lora_survives_a_copy_of_the_model():
    model, batch = adapted(depth=1)
    add_lora(model, rank=2)
    with torch.no_grad():
        for parameter in attached(model).factors.lowrank.parameters():
            parameter.fill_(0.1)
        twin = copy.deepcopy(model)
        torch.testing.assert_close(output(compiled(twin)(**batch)), output(compiled(model)(**batch)))
        merge_lora(twin)
        assert attached(model).factors.lowrank is not None
        torch.testing.assert_close(output(compiled(twin)(**batch)), output(compiled(model)(**batch)), rtol=1e-4, atol=1e-5)


def texts(count=8):
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(3, 90, (2 * count, 1), generator=generator)
    rows = (start + 7 * torch.arange(12)) % 90 + 3  # something to learn
    return [
        {"input_ids": rows[i : i + 2], "attention_mask": torch.ones(2, 12, dtype=torch.int64)} for i in range(0, 2 * count, 2)
    ]


SETTINGS = Settings(rate=1e-2, warmup=0.1, accumulate=2)


@pytest.mark.parametrize("method", ["factors", "all", "lora"])
@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_a_few_steps_lower_the_loss(method, distill):
    model, _ = adapted(depth=1)
    dense = copy.deepcopy(model)
    add_lora(model, rank=8) if method == "lora" else trainable(model, what=method)
    batches = texts(12)
    settings = replace(SETTINGS, distill=distill)
    done = train(compiled(model), batches[:10], settings=settings, held_out=batches[10:], progress=False)
    assert len(done.losses) == 5 and done.tokens == 10 * 24
    (first, before), (last, after) = done.evaluations
    assert (first, last) == (0, 5) and after < before
    assert after == pytest.approx(evaluate(compiled(model), batches[10:], progress=False).mean_loss, rel=1e-5)
    if method != "all":
        changed = {name for name, p in model.named_parameters() if name in dict(dense.named_parameters())
                   and not torch.equal(p, dict(dense.named_parameters())[name])}  # fmt: skip
        assert all(name.startswith("rana_fx.") or "down_proj" in name for name in changed)


def test_accumulation_is_one_batch_of_all():
    results = []
    for batches, accumulate in ((texts(4), 4), ([{k: torch.cat([b[k] for b in texts(4)]) for k in texts(1)[0]}], 1)):
        torch.manual_seed(0)
        model, _ = adapted(depth=1, recipe="static")
        trainable(model)
        train(compiled(model), batches, settings=replace(SETTINGS, accumulate=accumulate, warmup=0.0), progress=False)
        results.append({name: p.detach() for name, p in model.named_parameters()})
    for name, value in results[0].items():
        # Adam divides a gradient by its size: where it is rounding, so is the direction
        assert relative(results[1][name], value) < 2e-3, name


def test_resuming_is_exact(tmp_path):
    settings = replace(SETTINGS, checkpoint_every=2, evaluate_every=1, accumulate=1)
    batches = texts(6)

    def fresh():
        torch.manual_seed(0)
        model, _ = adapted(depth=1)
        model.config.attention_dropout = 0.1  # the state of the random numbers counts
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        trainable(model)
        return model

    class Stop(Exception):
        pass

    def stop(*_):
        evaluations.append(0)
        if len(evaluations) == 6:  # before the first step, and after each: step 5, a step after a checkpoint
            raise Stop
        return held_out_loss(*_)

    model = fresh()
    whole = train(compiled(model), batches, settings=settings, held_out=texts(1), folder=tmp_path / "a", progress=False)
    evaluations, held_out_loss = [], loop._held_out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_held_out", stop)
        with pytest.raises(Stop):
            train(compiled(fresh()), batches, settings=settings, held_out=texts(1), folder=tmp_path / "b", progress=False)
    second = fresh()
    torch.manual_seed(99)
    done = train(
        compiled(second), batches, settings=settings, held_out=texts(1), folder=tmp_path / "b", resume=True, progress=False
    )
    assert (
        len(whole.losses) == 6
        and done.losses == whole.losses
        and done.evaluations == whole.evaluations
        and done.tokens == whole.tokens
    )
    assert trained_plan(second).digest() == trained_plan(model).digest()


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    model, _ = adapted(depth=1)
    trainable(model)
    settings = replace(SETTINGS, checkpoint_every=1)
    with pytest.raises(CheckpointError, match="there is no such file"):
        train(compiled(model), texts(2), settings=settings, folder=tmp_path, resume=True, progress=False)
    train(compiled(model), texts(2), settings=settings, folder=tmp_path, progress=False)
    with pytest.raises(CheckpointError, match="its setting rate is 0.01, here it is 0.5.*pass what it was made with"):
        train(compiled(model), texts(2), settings=replace(settings, rate=0.5), folder=tmp_path, resume=True, progress=False)
    with pytest.raises(CheckpointError, match="its text is"):
        train(compiled(model), texts(3)[1:], settings=settings, folder=tmp_path, resume=True, progress=False)
    (tmp_path / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="it is not a whole checkpoint"):
        train(compiled(model), texts(2), settings=settings, folder=tmp_path, resume=True, progress=False)


def test_a_loss_that_is_not_finite_stops_before_it_does_harm(tmp_path):
    model, _ = adapted(depth=1)
    chosen = trainable(model)
    settings = replace(SETTINGS, accumulate=1, checkpoint_every=2)
    forward = compiled(model)
    seen = []

    class Poisoned(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, **batch):
            out = forward(**batch)
            seen.append({name: p.detach().clone() for name, p in chosen.items()})
            if len(seen) == 4:
                out.logits = out.logits * float("nan")
            return out

    poisoned = Poisoned()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "bare", lambda _: model)
        with pytest.raises(
            LossNotFinite, match=r"step 4: the loss is nan.* as step 3 left.* the checkpoint of step 2 is in .* rate"
        ):
            train(poisoned, texts(6), settings=settings, folder=tmp_path, progress=False)
    assert all(torch.equal(p, seen[3][name]) for name, p in chosen.items())
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(state["parameters"][name], seen[2][name]) for name in chosen)


def test_the_best_rate_is_found_and_the_model_is_as_before():
    model, _ = adapted(depth=1)
    chosen = trainable(model)
    before = {name: p.detach().clone() for name, p in chosen.items()}
    batches = texts(12)
    rate, losses = best_rate(
        compiled(model),
        batches[:10],
        settings=SETTINGS,
        held_out=batches[10:],
        rates=(1e-9, 1e-2, 1e30),
        fraction=0.6,
        progress=False,
    )
    assert rate == 1e-2 and losses[1e-2] < losses[1e-9] < losses[1e30]
    assert all(torch.equal(p, before[name]) for name, p in chosen.items())
    with pytest.raises(InvalidOption, match="rates"):
        best_rate(compiled(model), batches, settings=SETTINGS, held_out=batches, rates=())


@pytest.mark.parametrize("recipe", ["paper", "teal", "cats"])
def test_thresholds_go_where_they_keep_what_was_planned(recipe):
    model, _ = adapted(recipe, depth=1, budget=0.8)
    batches = [ids() for _ in range(8)]
    plan = attached(model).plan
    with torch.no_grad():  # as training might: everything grows
        model.get_input_embeddings().weight.mul_(1.5)
        for layer in model.model.layers:
            layer.input_layernorm.weight.mul_(1.7)
            layer.post_attention_layernorm.weight.mul_(1.7)
    with measuring(model) as meter:
        for batch in batches:
            meter.run(batch)
    off = abs(meter.result().budget_flops - plan.expected_budget("flops"))
    result = rethreshold(model, batches)
    assert abs(result.budget_flops - plan.expected_budget("flops")) < min(0.02, off)
    assert any(not torch.equal(new.tau, old.tau) for new, old in zip(trained_plan(model).adapters, plan.adapters, strict=True))
    with measuring(model) as meter:  # a plan of it keeps the same
        rana_fx.attach(model, trained_plan(model))
    assert attached(model).plan.expected_budget() == plan.expected_budget()


def test_rates_rise_and_fall():
    for decay in ("cosine", "linear"):
        settings = Settings(rate=1.0, warmup=0.2, decay=decay)
        rates = [settings.rate_at(step, 10) for step in range(10)]
        assert rates[:3] == [0.5, 1.0, 1.0] and rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
        assert 0 < rates[-1] < 0.2


def test_mistakes_are_told():
    plain, _ = build("llama", 1)
    with pytest.raises(NoPlan):
        trainable(plain)
    with pytest.raises(NoPlan):
        trained_plan(plain)
    model, batch = adapted(depth=1)
    with pytest.raises(UnknownChoice, match="factors, all"):
        trainable(model, what="router")
    with pytest.raises(UnknownTarget, match=r"'\*q_proj\*' matches no matrix .*a0_router.*rana_fx\.\*"):
        add_lora(model, targets=["*q_proj*"])
    with pytest.raises(InvalidOption, match="a list of names"):
        add_lora(model, targets="*")
    with pytest.raises(InvalidOption, match="rank"):
        add_lora(model, rank=0)
    add_lora(model, rank=2)
    with pytest.raises(InvalidOption, match="merge_lora"):
        add_lora(model, rank=2)
    model.requires_grad_(False)
    with pytest.raises(NothingToTrain, match="frozen"):
        train(compiled(model), texts(2), settings=SETTINGS)
    with pytest.raises(NoBatches):
        train(compiled(model), texts(1), settings=SETTINGS)
    with pytest.raises(NoBatches):
        rethreshold(model, [])
    for wrong in ({"rate": 0.0}, {"decay": "step"}, {"warmup": 1.0}, {"distill": 2.0}, {"accumulate": 0}, {"autocast": "int8"}):
        with pytest.raises(InvalidOption, match=next(iter(wrong))):
            Settings(**wrong)


def test_quantised_factors_are_not_trained():
    model, batch = build("llama", 1)
    rana_fx.adapt(model, [batch, *(ids() for _ in range(4))], budget=0.9, recipe="dense", progress=False)
    with pytest.raises(NothingToTrain, match='what="all"'):
        trainable(model)
    assert trainable(model, what="all")
