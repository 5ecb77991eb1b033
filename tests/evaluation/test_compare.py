"""Dense and adapted side by side: measurements against direct ones, decoding against ``generate``, the words for each case."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

import rana_fx
from rana_fx.curve import Interval
from rana_fx.errors import InvalidOption, NoBatches, NoPlan
from rana_fx.evaluation import decoding, verdict
from rana_fx.evaluation.compare import PROMPT, Comparison, Side, _compiled, compare
from rana_fx.evaluation.measure import measuring
from rana_fx.evaluation.perplexity import load_model
from tests.golden.interface import without_inductor
from tests.support.tiny_model import saved_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder, _ = saved_tiny(tmp_path_factory.mktemp("tiny"), layers=1)
    return load_model(str(folder), device="cpu")[0]


def rows(count, seed=0):
    """Documents of 12 tokens, the last of each batch of 7."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(4, 12, dtype=torch.int64)
    mask[3, 7:] = 0
    return [
        {"input_ids": torch.randint(4096, (4, 12), generator=generator), "attention_mask": mask.clone()} for _ in range(count)
    ]


@pytest.fixture
def adapted(model):
    plan = rana_fx.adapt(model, rows(4), budget=0.5, recipe="teal", progress=False)
    yield model, plan
    rana_fx.detach(model)


def test_quality_is_that_of_the_two_models(adapted):
    model, plan = adapted
    batches, seen = rows(3, seed=1), []
    with without_inductor():
        found = compare(model, batches, new_tokens=3, progress=seen.append)
    same = tokens = 0
    losses = {"dense": 0.0, "adapted": 0.0}
    with measuring(model) as meter, torch.no_grad():
        for batch in batches:
            logits = {"dense": model(**batch).logits, "adapted": meter(**batch).logits}
            real = batch["attention_mask"].bool()
            same += int((logits["dense"].argmax(-1) == logits["adapted"].argmax(-1))[real].sum())
            tokens += int(real.sum())
            for name, values in logits.items():
                kept = values[:, :-1][real[:, 1:]]
                losses[name] += float(nn.functional.cross_entropy(kept, batch["input_ids"][:, 1:][real[:, 1:]], reduction="sum"))
    targets = tokens - 12
    assert (found.documents, found.tokens, found.plan) == (12, tokens, plan.digest()[:12])
    assert found.agreement.mean == pytest.approx(same / tokens) and found.agreement.mean < 1
    for name, side in (("dense", found.dense), ("adapted", found.adapted)):
        # fp32 sums of a hundred losses of some ten nats
        assert side.perplexity == pytest.approx(math.exp(losses[name] / targets), rel=1e-4)
    assert found.perplexity.mean == pytest.approx(found.adapted.perplexity - found.dense.perplexity, rel=1e-6)
    assert 0 < found.kl.low < found.kl.mean < found.kl.high
    assert seen[-1].fraction == 1.0 and [step.stage for step in seen if step.done == 0][-1] == "speed"
    assert json.loads(json.dumps(found.to_dict()))["faster"] in (True, False, None)


def test_memory_and_what_a_token_reads(adapted):
    model, plan = adapted
    with without_inductor():
        found = compare(model, rows(2), new_tokens=1, independent=False, progress=False)
    weights = sum(value.numel() for value in model.parameters()) * 4 + sum(value.nbytes for value in model.buffers())
    kept = sum(value.nbytes for adapter in plan.adapters for value in adapter.tensors().values())
    assert (found.dense.memory_bytes, found.adapted.memory_bytes) == (weights, weights + kept)
    counted = sum(site.cost("bytes") for site in plan.sites if site.counted)
    head = 32 * 4096 * 4
    assert found.dense.read_bytes == counted + head
    assert found.adapted.read_bytes == pytest.approx(counted * plan.expected_budget("bytes") + head)
    # rows that are parts of one document have no intervals, though there are eight
    assert found.documents == 8 and found.kl is None and found.agreement is None and found.dense.perplexity is not None
    assert (found.prompt_tokens, found.new_tokens, found.mode, found.device) == (12, 1, "default", "cpu")
    assert found.adapters == len(plan.adapters) and found.expected_ms is None


def test_both_models_are_compiled_each_as_itself_in_one_mode(model, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward, **given: compiled.append((forward.__self__, given)))
    assert list(_compiled(model, "a mode")) == ["dense", "adapted"]
    assert compiled == [
        (model, {"backend": "inductor", "mode": "a mode", "dynamic": False}),
        (model, {"backend": rana_fx.backend, "options": {"mode": "a mode"}, "dynamic": False}),
    ]


def test_decoding_is_that_of_generate(model, monkeypatch):
    prompt = torch.arange(5, 14)[None]
    wanted = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)[0, 9:].tolist()
    positions: list[list[int]] = []
    now, tokens, calls = [0.0], {"a": [], "b": []}, {"a": 0, "b": 0}
    monkeypatch.setattr(decoding.time, "perf_counter", lambda: now[0])

    def forward(name, seconds):
        def run(**given):
            calls[name] += 1
            now[0] += seconds + (10.0 if calls[name] == 1 else 0.0)
            positions.append(given["position_ids"][0].tolist())
            output = model(**given)
            tokens[name].append(int(output.logits[0, -1].argmax()))
            return output

        return run

    found = decoding.decoding_times(model, prompt, {"a": forward("a", 0.002), "b": forward("b", 0.001)}, new_tokens=4)
    assert tokens["a"] == tokens["b"] and tokens["a"][-5:] == wanted == tokens["a"][-10:-5]
    assert positions[-5:] == [list(range(9)), [9], [10], [11], [12]]
    assert len(found["a"].rounds_ms) == len(found["a"].first_ms) == decoding.ROUNDS
    assert [len(steps) for steps in found["a"].rounds_ms] == [4] * decoding.ROUNDS
    assert found["a"].medians_ms == pytest.approx([2.0] * 3) and found["b"].first_ms == pytest.approx([1.0] * 3)
    assert found["a"].compile_s == pytest.approx(10.0)


def test_bad_input_is_noticed_before_anything_runs(model, adapted, monkeypatch):
    monkeypatch.setattr("rana_fx.evaluation.compare.calibrate", None)
    with pytest.raises(NoBatches):
        compare(model, [])
    with pytest.raises(InvalidOption, match="new_tokens=0 is not valid: expected a positive number, at most 2036"):
        compare(model, rows(1), new_tokens=0)
    with pytest.raises(InvalidOption, match="the model's context is 2048"):
        compare(model, rows(1), new_tokens=2037)
    with pytest.raises(InvalidOption, match="option model='Linear' is not valid: expected a causal language model"):
        compare(nn.Linear(2, 2), rows(1))
    rana_fx.detach(model)
    with pytest.raises(NoPlan):
        compare(model, rows(1))
    rana_fx.attach(model, adapted[1])


# ---- words

DENSE = Side(20.0, 4.0, 12.0, 30.0, 26_000_000, 20_000_000)
ADAPTED = Side(21.0, 2.0, 12.0, 60.0, 31_000_000, 16_000_000)
FASTER = Comparison(
    model="LlamaForCausalLM", plan="0a1b2c3d4e5f", recipe="rana", budget=0.6, metric="flops", device="cpu", dtype="float32",
    mode="default", documents=64, tokens=16_384, prompt_tokens=PROMPT, new_tokens=32, dense=DENSE, adapted=ADAPTED,
    kl=Interval(0.05, 0.04, 0.06), agreement=Interval(0.9, 0.89, 0.91), perplexity=Interval(1.0, 0.8, 1.2),
    speedup=Interval(2.0, 1.9, 2.1), adapters=32, unmasked=0,
)  # fmt: skip


def words(**changed):
    found = verdict.lines(dataclasses.replace(FASTER, **changed))
    assert len(found) <= 20 and all(len(line) <= 80 for line in found), found
    return " ".join(" ".join(found).split())


def test_what_is_gained():
    text = words()
    assert "Gained: a token is decoded 2.00 times as fast (1.90 to 2.10 in 3 rounds), for +5.0% perplexity." in text
    assert "KL 0.0500 (0.0400 to 0.0600) nats a token, same greedy token 90.0% (89.0% to 91.0%)" in text
    assert "perplexity +1.000 (+0.800 to +1.200); 95 % intervals. 64 documents, 16,384 tokens" in text and "Why" not in text


def test_nothing_is_gained_on_a_cpu_and_why():
    text = words(speedup=Interval(0.9, 0.8, 0.95), unmasked=7)
    assert "Nothing is gained: decoding is slower, 0.90 times as fast" in text
    assert "16.0 MB of weights instead of 20.0, which allows 1.25 times the speed at most; 7 of 32 adapters have no" in text
    assert "No gain that can be told from noise: 1.01 times" in words(speedup=Interval(1.01, 0.98, 1.03))
    assert "which saves none" in words(speedup=Interval(1, 1, 1), adapted=dataclasses.replace(ADAPTED, read_bytes=2e7))


def test_nothing_is_gained_on_a_gpu_and_why():
    gpu = {"device": "cuda:0", "mode": "reduce-overhead", "expected_ms": (0.5, 0.6), "speedup": Interval(0.8, 0.8, 0.81)}
    text = words(**gpu, slower=("model.layers.0.mlp.down_proj.weight", "b", "c"))
    assert "this GPU is expected to take 0.60 ms a token, dense 0.50; 3 of 32 adapters take longer than the linears" in text
    assert "b and 1 more): products this small are bound by launches" in text
    assert "bound by launches" not in words(**gpu)


def test_without_intervals_or_next_tokens():
    side = dataclasses.replace(DENSE, perplexity=None)
    text = words(kl=None, agreement=None, perplexity=None, dense=side, adapted=side)
    assert "perplexity - - ms a decoded" in text and "No intervals: 8 documents are needed" in text
    assert "in 3 rounds)." in text
    assert "perplexity +" not in words(perplexity=None)
