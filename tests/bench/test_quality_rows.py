"""Rows of bench.quality: documents of tokens, intervals over documents, ratios at equal measured budget, plots."""

from __future__ import annotations

import json
import math
from importlib import resources
from types import SimpleNamespace

import pytest
import torch
import typer

from bench.common import plot, table
from bench.common.documents import Text, read_text
from bench.quality.divergence import compare, interval
from rana_fx.evaluation.perplexity import evaluate


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resources.files("rana_fx") / "data" / "tiny-llama-prose-5m")


def test_every_token_has_the_document_it_is_from(tmp_path, tokenizer):
    texts = ["One two three.", "Four.", "Five six seven eight nine ten.", "Eleven."]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    text = read_text(str(path), tokenizer, tokens=1000, context=4)
    assert text.unit == "document"
    ids = torch.cat([batch["input_ids"].flatten() for batch in text.batches])
    mask = torch.cat([batch["attention_mask"].flatten() for batch in text.batches]).bool()
    documents = torch.cat([part.flatten() for part in text.documents])
    assert [part.shape for part in text.documents] == [batch["input_ids"].shape for batch in text.batches]
    for number, source in enumerate(texts):
        assert tokenizer.decode(ids[mask & (documents == number)], skip_special_tokens=True).strip() == source
    shorter = read_text(str(path), tokenizer, tokens=5, context=4)
    assert torch.equal(torch.cat([part.flatten() for part in shorter.documents]), documents[:8])


def test_articles_are_the_documents_of_a_text_without_rows(tmp_path, tokenizer):
    path = tmp_path / "wiki.txt"
    path.write_text(" \n = First one = \n \n Words here . \n \n = = A section = = \n \n More . \n \n = Second = \n \n End . \n")
    text = read_text(str(path), tokenizer, tokens=1000, context=16)
    ids = torch.cat([batch["input_ids"].flatten() for batch in text.batches])
    documents = torch.cat([part.flatten() for part in text.documents])
    assert text.unit == "article" and documents.max() == 1
    assert tokenizer.decode(ids[documents == 0]).rstrip().endswith("More .")
    assert "Second" in tokenizer.decode(ids[documents == 1]) and "More" not in tokenizer.decode(ids[documents == 1])


def test_sequences_stand_in_where_there_are_no_documents(tmp_path, tokenizer):
    path = tmp_path / "plain.txt"
    path.write_text("Words and words. " * 40)
    text = read_text(str(path), tokenizer, tokens=1000, context=32)
    assert text.unit == "sequence"
    assert all((part == part[:, :1]).all() for part in text.documents)
    assert len(torch.cat(text.documents)[:, 0].unique()) == sum(len(part) for part in text.documents)


def test_an_interval_resamples_documents_not_tokens():
    # two kinds of documents: the variance is between documents, independent of their length
    few = interval(torch.tensor([0.0, 1000.0] * 4).double(), torch.full((8,), 1000.0).double())
    many = interval(torch.tensor([0.0, 1.0] * 4000).double(), torch.ones(8000).double())
    assert few[1] - few[0] > 0.5 and many[1] - many[0] < 0.03
    assert few[0] < 0.5 < few[1]
    # the mean is over tokens: a long document counts by its length
    low, high = interval(torch.tensor([0.0, 90.0]).double(), torch.tensor([10.0, 90.0]).double())
    assert low == 0 and high == 1


def test_losses_belong_to_the_document_of_the_predicted_token(device):
    ids = torch.tensor([[0, 1, 2, 1], [2, 0, 1, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    dense = torch.randn(2, 4, 3)
    adapted = dense + torch.randn(2, 4, 3)
    batch = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    text = Text([batch], [torch.tensor([[0, 0, 1, 1], [1, 2, 2, 2]])], "document")
    calls = [lambda logits=logits, **_: SimpleNamespace(logits=logits) for logits in (adapted.to(device), dense.to(device))]
    quality, found = compare(*calls, text, progress=False, device=device)
    more = -adapted.log_softmax(-1) + dense.log_softmax(-1)
    # (row, position predicted from, token): documents 0, 1, 1 | 2, 2
    sums = [more[0, 0, 1], more[0, 1, 2] + more[0, 2, 1], more[1, 0, 0] + more[1, 1, 1]]
    expected = interval(torch.stack(sums).double(), torch.tensor([1.0, 2.0, 2.0]).double())
    assert found.interval == pytest.approx(expected, rel=1e-5)
    assert (found.documents, found.resampled, quality.tokens) == (3, "document", 5)
    rise = quality.mean_loss - evaluate(calls[1], [batch], progress=False).mean_loss
    assert rise == pytest.approx(float(sum(sums)) / 5, rel=1e-5)


def row(recipe, measured, delta, *, metric="flops", text="t", budget=None, **more):
    facts = {"bench": "quality", "model": "m", "dtype": "float32", "metric": metric, "text": text, "recipe": recipe}
    spent = {"flops": measured, "bytes": measured}
    return {
        **facts,
        "budget": budget or measured,
        "measured": spent,
        "delta": delta,
        "mean_loss": 3.0,
        "perplexity": 20.0,
        **more,
    }


def test_increases_are_compared_at_equal_measured_budget():
    rows = [
        row("rana", 0.4, 0.1),
        row("paper", 0.35, 0.8, budget=0.4),
        row("paper", 0.45, 0.2),
        row("teal", 0.3, 1.6),
        row("teal", 0.5, 0.1),
        row("wina", 0.38, 0.3),
        row("wina", 0.395, 0.25),
    ]
    ((budget, ours, paper, teal, wina, over_paper, over_best),) = table.ratios_of(rows, "flops", "t")
    assert (budget, ours) == (0.4, 0.1)
    assert paper == pytest.approx(0.4) and teal == pytest.approx(0.4)  # geometric means
    assert wina == pytest.approx(0.25 * (0.25 / 0.3) ** (5 / 15))  # 0.005 beyond its end
    assert over_paper == pytest.approx(0.25) and over_best == pytest.approx(0.1 / wina)
    assert table.ratios_of([*rows[:-2], row("wina", 0.38, 0.3), row("wina", 0.385, 0.25)], "flops", "t")[0][4:] == (
        None,
        pytest.approx(0.25),
        None,
    )
    assert table.interpolated([(0.5, 0.1)], 0.5) is None and table.interpolated([(0.4, -0.1), (0.5, 0.1)], 0.45) is None


def test_later_files_replace_points_and_other_benches_are_refused(tmp_path):
    first, second, other = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    first.write_text(json.dumps(row("rana", 0.5, 0.3)) + "\n" + json.dumps(row("rana", 0.4, 0.5)) + "\n")
    second.write_text(json.dumps(row("rana", 0.5, 0.1)) + "\n" + json.dumps(row("rana", 0.5, 0.2, metric="bytes")) + "\n")
    rows = table.read([first, second])
    assert sorted(r["delta"] for r in rows) == [0.1, 0.2, 0.5]
    other.write_text(json.dumps({"bench": "mlp_error"}) + "\n")
    with pytest.raises(typer.BadParameter, match="mlp_error"):
        table.read([other])


def test_old_rows_are_shown_and_compared(capsys):
    old = [row("paper", 0.4, 0.4), row("cats", 0.4, None) | {"unreachable": "too low"}, row("dense", 1.0, 0.0)]
    old[1].pop("measured")
    table.table([*old, row("rana", 0.4, 0.2, interval=[0.1, 0.3], kl=0.2, agreement=0.8)])
    table.show_ratios([*old, row("rana", 0.4, 0.2), row("paper", 0.5, 0.1)])
    shown = capsys.readouterr().out
    assert "unreachable" in shown and "0.1000 .. 0.3000" in shown and "0.5000" in shown


def test_one_figure_per_model_and_metric_with_bars_and_points(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    source = tmp_path / "rows.jsonl"
    rows = [
        row("dense", 1.0, 0.0),
        row("rana", 0.4, 0.2, interval=[0.1, 0.4]),
        row("rana", 0.5, 0.1),
        row("rana", 0.4, 0.2, text="other"),
        row("int8", 0.5, -0.001, metric="bytes", interval=[-0.01, 0.002]),
        row("rana", 0.3, 0.1, metric="bytes"),
    ]
    source.write_text("".join(json.dumps(r) + "\n" for r in rows))
    plot.main([source], tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "quality-m-bytes-float32.png",
        "quality-m-flops-float32.png",
    ]
    flops, in_bytes = drawn
    assert len(flops.axes) == 2 and flops.axes[0].get_yscale() == "log"
    (container,) = flops.axes[0].containers
    assert container[0].get_xydata().tolist() == [[0.4, 0.2], [0.5, 0.1]]
    (bars,) = container[2]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [pytest.approx([0.1, 0.4]), pytest.approx([0.1, 0.1])]
    (axis,) = in_bytes.axes
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["int8", "rana"]
    point = axis.containers[0][0]
    assert point.get_linestyle() == "None" and point.get_ydata()[0] == pytest.approx(1e-4)
    assert math.isclose(axis.containers[0][2][0].get_segments()[0][1, 1], 0.002)
    for figure in drawn:
        monkeypatch.undo()
        plt.close(figure)
