"""bench.pareto: plans of each metric beside rivals, losses and divergences with intervals, a figure; plans that are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import rana_fx
from bench.speed import decoding, pareto
from bench.speed.losses import DENSE, Text
from rana_fx.errors import InvalidOption, UnknownChoice
from rana_fx.evaluation.perplexity import load_model
from rana_fx.plan import load_plan

DATA = Path(rana_fx.__file__).parent / "data"
MODEL = DATA / "tiny-llama-prose-5m"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The embedded model without all layers but the first: graphs of six take six times as long to trace."""
    model, tokenizer = load_model(str(MODEL), device="cpu")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    folder = tmp_path_factory.mktemp("one-layer")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setitem(decoding._COPY_BYTES, "cpu", 2**22)
    # compiling the dense model is not the subject
    monkeypatch.setattr(pareto, "COMPILED", "eager")
    return dict(
        data=DATA / "calib.jsonl.xz", text=DATA / "eval.jsonl.xz", out=tmp_path / "rows.jsonl", plans=tmp_path / "plans",
        figure=tmp_path / "pareto.png", budgets="0.7,0.5", metrics="flops", rivals="", tokens=1024, text_tokens=8 * 512,
        sequences=1, longest=8, new_tokens=4, device="cpu", recipe="teal",
    )  # fmt: skip


@pytest.mark.usefixtures("graphs_as_rewritten")
def test_rows_have_time_and_loss_and_plans_are_kept(checkpoint, options, capsys, monkeypatch):
    pareto.main(checkpoint, **options)
    rows = [json.loads(line) for line in options["out"].read_text().splitlines()]
    dense, *ours = [row for row in rows if row["kind"] == "decode"]
    assert [row["plan"] for row in ours] == ["flops-0.7", "flops-0.5"]
    assert dense["variant"] == "eager" and "delta" not in dense["loss"]
    for row in ours:
        (mean, low, high), kl = row["loss"]["delta"], row["loss"]["kl"]
        assert low < mean < high and mean == pytest.approx(row["loss"]["mean_loss"] - dense["loss"]["mean_loss"], abs=1e-6)
        assert 0 < kl[1] < kl[0] < kl[2]
    assert ours[0]["loss"]["kl"][0] < ours[1]["loss"]["kl"][0]
    assert options["figure"].read_bytes().startswith(b"\x89PNG")
    assert load_plan(options["plans"] / "flops-0.5").budget == 0.5
    assert {row["bench"] for row in rows} == {"pareto"}
    # a second run adapts nothing
    monkeypatch.setattr(rana_fx, "adapt", lambda *_, **__: pytest.fail("adapted again"))
    monkeypatch.setattr(pareto, "compare", lambda run, tried: asked.extend(tried))
    asked = []
    pareto.main(checkpoint, **options | dict(budgets="0.7", figure=None))
    assert [variant.label for variant in asked] == ["eager", "rana 0.7"]
    with pytest.raises(InvalidOption, match="a plan of recipe wina and metric flops, this is of teal and flops"):
        pareto.main(checkpoint, **options | dict(budgets="0.7", recipe="wina"))


def test_what_cannot_be_measured(checkpoint, options):
    with pytest.raises(UnknownChoice, match="metric"):
        pareto.main(checkpoint, **options | dict(metrics="flops,time"))
    with pytest.raises(InvalidOption, match="a shape has random weights"):
        pareto.main("tiny", **options)
    with pytest.raises(InvalidOption, match="other text than --data"):
        pareto.main(checkpoint, **options | dict(text=options["data"]))


def test_divergences_are_those_of_the_predictions():
    generator = torch.Generator().manual_seed(0)
    windows = [{"input_ids": torch.randint(7, (1, 5), generator=generator)} for _ in range(9)]
    dense, other = (torch.randn(9, 1, 5, 7, generator=generator) for _ in range(2))
    text = Text(windows)

    def model(logits):
        rest = iter(logits)
        return lambda input_ids: next(rest)

    assert text.loss(DENSE, model(dense)).keys() == {"mean_loss", "perplexity", "tokens"}
    found = text.loss("other", model(other))
    p, q = (logits[:, 0, :-1].double().log_softmax(-1) for logits in (dense, other))
    assert found["kl"][0] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    targets = torch.stack([window["input_ids"][0, 1:] for window in windows])[..., None]
    assert found["delta"][0] == pytest.approx(float((p - q).gather(2, targets).mean()), rel=1e-5)
    fewer = Text(windows[:7], dense=text.dense)
    assert "kl" not in fewer.loss("other", model(other))  # too few windows for an interval


def test_points_of_rows():
    base = {"kind": "decode", "ms_per_token": {"p50": 2.0}}
    loss = {"mean_loss": 3.0, "delta": (0.1, 0.0, 0.2), "kl": (0.2, 0.1, 0.3)}
    rows = [
        base | {"variant": "reduce-overhead", "variant_kind": "dense", "loss": {"mean_loss": 2.9}},
        base | {"variant": "rana 0.5", "variant_kind": "rana", "plan": "bytes-0.5", "loss": loss},
        base | {"variant": "int8", "variant_kind": "int8", "loss": None},
        {"kind": "skipped", "variant": "int4"},
    ]
    dense, ours = pareto.points(rows)
    assert dense["delta"] == (0.0, 0.0, 0.0) and (dense["series"], dense["ours"]) == ("reduce-overhead", False)
    assert (ours["series"], ours["label"], ours["ms"], ours["kl"]) == ("bytes", "0.5", 2.0, (0.2, 0.1, 0.3))
