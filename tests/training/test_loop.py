"""The training loop: lower loss, accumulation, distillation, exact resume, stop at a loss that is not finite, rate search."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from rana_fx._backend import rewritten
from rana_fx.errors import CheckpointError, InvalidOption, LossNotFinite, NoBatches, NothingToTrain
from rana_fx.evaluation.perplexity import evaluate
from rana_fx.training import (
    Settings,
    add_lora,
    best_rate,
    checkpoint_gradients,
    loop,
    lora_config,
    merge_lora,
    train,
    trainable,
    trained_plan,
)
from tests.support.trained import SETTINGS, adapted, compiled, relative, texts


@pytest.mark.parametrize(("method", "distill"), [("factors", 0.0), ("all", 0.5), ("lora", 0.0)])
def test_a_few_steps_lower_the_loss(method, distill):
    model, _ = adapted(depth=1)
    dense = copy.deepcopy(model)
    add_lora(model, lora_config(rank=8, dropout=0.0)) if method == "lora" else trainable(model, what=method)
    batches = texts(12)
    settings = replace(SETTINGS, distill=distill)
    done = train(compiled(model), batches[:10], settings=settings, held_out=batches[10:], progress=False)
    assert len(done.losses) == 5 and done.tokens == 10 * 24
    assert len(done.step_seconds) == 5 and 0 < sum(done.step_seconds) <= done.seconds
    assert done.seconds_per_step() == sorted(done.step_seconds[2:])[1]  # the first two compile
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
        # Adam normalises gradients: a gradient of rounding size has a random direction
        assert relative(results[1][name], value) < 2e-3, name


def test_resuming_is_exact(tmp_path):
    settings = replace(SETTINGS, checkpoint_every=2, evaluate_every=1, accumulate=1)
    batches = texts(6)

    def fresh():
        torch.manual_seed(0)
        model, _ = adapted(depth=1)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1  # the random state must be restored
        add_lora(model)  # dropout uses random numbers, too
        return model

    class Stop(Exception):
        pass

    def stop(*args, **kwargs):
        evaluations.append(0)
        if len(evaluations) == 6:  # before the first step, and after each: step 5, a step after a checkpoint
            raise Stop
        return held_out_loss(*args, **kwargs)

    model = fresh()
    whole = train(compiled(model), batches, settings=settings, held_out=texts(1), folder=tmp_path / "a", progress=False)
    evaluations, held_out_loss = [], loop.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate", stop)
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
        and len(done.step_seconds) == 6
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
    folder = tmp_path / "lora"
    for dropout in (0.05, 0.1):
        merge_lora(model)
        add_lora(model, lora_config(rank=2, dropout=dropout))
        if dropout == 0.05:
            train(compiled(model), texts(2), settings=settings, folder=folder, progress=False)
    with pytest.raises(CheckpointError, match=r"its LoRA is dropout 0.05, scaling \[8.0\], here it is dropout 0.1, scaling"):
        train(compiled(model), texts(2), settings=settings, folder=folder, resume=True, progress=False)
    (tmp_path / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="it is not a complete checkpoint"):
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
                out = out._replace(logits=out.logits * float("nan"))
            return out

    poisoned = Poisoned()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "unwrap", lambda _: model)
        with pytest.raises(
            LossNotFinite, match=r"step 4: the loss is nan.* those after step 3.* the checkpoint of step 2 is in .* rate"
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


def test_rates_rise_and_fall():
    for decay in ("cosine", "linear"):
        settings = Settings(rate=1.0, warmup=0.2, decay=decay)
        rates = [settings.rate_at(step, 10) for step in range(10)]
        assert rates[:3] == [0.5, 1.0, 1.0] and rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
        assert 0 < rates[-1] < 0.2


def test_the_teacher_is_dense_where_the_model_is_compiled_in_place():
    """A model compiled in place is adapted at every call: as its own teacher the KL would be zero."""
    for choose in (add_lora, trainable):
        model, _ = adapted(depth=1)
        choose(model)
        batches, settings = texts(2), replace(SETTINGS, distill=1.0)
        expected = train(compiled(model), batches, settings=settings, progress=False).losses
        model, _ = adapted(depth=1)
        choose(model)
        model.compile(backend=rewritten)
        losses = train(model, batches, settings=settings, progress=False).losses
        assert losses == pytest.approx(expected, rel=1e-4) and losses[0] > 1e-3


def test_invalid_calls_raise():
    model, _ = adapted(depth=1)
    model.requires_grad_(False)
    with pytest.raises(NothingToTrain, match="frozen"):
        train(compiled(model), texts(2), settings=SETTINGS)
    with pytest.raises(NoBatches):
        train(compiled(model), texts(1), settings=SETTINGS)
    for wrong in ({"rate": 0.0}, {"decay": "step"}, {"warmup": 1.0}, {"distill": 2.0}, {"accumulate": 0}, {"autocast": "int8"}):
        with pytest.raises(InvalidOption, match=next(iter(wrong))):
            Settings(**wrong)
    with pytest.raises(InvalidOption, match="model='Linear' is not valid: expected a model of transformers"):
        checkpoint_gradients(nn.Linear(2, 2))
