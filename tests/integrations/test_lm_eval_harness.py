"""Tasks of lm-evaluation-harness: dense plans have the scores of lm_eval's own model, adapted plans those of the adapted model;
errors. Tasks and model are local; nothing is downloaded.
"""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")
import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from typer.testing import CliRunner

import rana_fx
from rana_fx.cli import app
from rana_fx.errors import InvalidOption, ModelError, PlanFileError, PlanMismatch
from rana_fx.evaluation.perplexity import load_model
from rana_fx.evaluation.text import load_texts, token_batches
from rana_fx.integrations.lm_eval_harness import PAPER_TASKS, RanaLM, language_model, run_tasks
from rana_fx.lm_eval import main as lm_evals_command_line
from tests.support.by_hand import outputs_by_hand
from tests.support.tiny_model import CHOICE, saved_tiny

ROLLING = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{start}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
TASKS = ["local_choice", "local_text"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder of a model, folder of its dense plan, of an adapted one, of the tasks)."""
    folder = tmp_path_factory.mktemp("harness")
    model, text = saved_tiny(folder, layers=1)
    network, tokenizer = load_model(str(model), device="cpu")
    texts = load_texts(text)
    batches = token_batches(texts, tokenizer, tokens=2048, context=128)
    for name, budget in (("dense", 1.0), ("paper", 0.6)):
        rana_fx.adapt(network, batches, budget=budget, recipe=name, progress=False).save(folder / name)
        rana_fx.detach(network)
    words = " ".join(texts).split()
    rows = [
        {"start": " ".join(words[i : i + n]), "ends": [" ".join(words[i + n : i + n + 1 + k]) for k in range(3)], "label": n % 3}
        for i, n in zip(range(0, 400, 50), range(3, 11), strict=True)
    ]
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, pattern in (("choice", CHOICE), ("text", ROLLING)):
        (tasks / f"{name}.yaml").write_text(pattern.format(data=tasks / "rows.jsonl"))
    return str(model), folder / "dense", folder / "paper", tasks


@pytest.fixture(autouse=True)
def _data_sets_of_this_run(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def requests(tasks: Path):
    rows = [json.loads(line) for line in (tasks / "rows.jsonl").read_text().splitlines()]
    return [(row["start"], " " + end) for row in rows for end in row["ends"]]


def test_a_dense_plan_scores_as_the_dense_model(tiny):
    model, dense, _, tasks = tiny
    given = {"compile": False, "batch_size": 3, "device": "cpu", "dtype": "float32"}
    scores = [run_tasks(language_model(model, plan=plan, **given), TASKS, include=tasks) for plan in (None, dense)]
    # the same operations on the same numbers
    assert scores[0] == scores[1]
    assert set(scores[0]) == set(TASKS)
    assert {"acc", "acc_stderr", "acc_norm"} <= set(scores[0]["local_choice"])
    # a random model has about log(4096) nats per token, and a word has at least one token
    assert scores[0]["local_text"]["word_perplexity"] > 1000


@pytest.mark.parametrize("compile", [False, True])
def test_log_probabilities_are_those_of_the_adapted_model(tiny, compile):
    model, _, plan, tasks = tiny
    lm = RanaLM(model, plan, compile=compile, batch_size=4, device="cpu")
    pairs = requests(tasks)
    got = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True)
    network, tokenizer = load_model(model, device="cpu")
    dense = []
    rana_fx.attach(network, rana_fx.load_plan(plan))
    for (start, end), (value, greedy) in zip(pairs, got, strict=True):
        context = tokenizer(start)["input_ids"]
        ids = tokenizer(start + end)["input_ids"]
        given = {"input_ids": torch.tensor([ids])}
        expected, same = _score(outputs_by_hand(network, given)[0], ids, len(context))
        # sums of at most four log-probabilities, in float32 through a block
        assert value == pytest.approx(expected, abs=64 * torch.finfo(torch.float32).eps * len(ids) * math.log(4096))
        assert greedy == same
        with torch.no_grad():
            dense.append(_score(network(**given).logits, ids, len(context))[0])
    assert max(abs(value - other) for (value, _), other in zip(got, dense, strict=True)) > 1e-3, "the plan does nothing"


def _score(logits, ids, context):
    rows, target = logits[0, context - 1 : -1].double().log_softmax(-1), torch.tensor(ids[context:])
    return float(rows.gather(1, target[:, None]).sum()), bool((rows.argmax(-1) == target).all())


def test_the_model_is_registered_and_takes_arguments_as_text(tiny):
    model, _, plan, _ = tiny
    assert get_model("rana") is RanaLM
    made = RanaLM.create_from_arg_string(f"pretrained={model},plan={plan},compile=false,prefill=dense", {"device": "cpu"})
    loaded = rana_fx.load_plan(plan)
    assert made.plan.digest() == loaded.digest()
    # the dtype of the checkpoint or of lm_eval would not fit the plan
    assert str(made.model.dtype) == f"torch.{loaded.sites[0].dtype}"
    info = made.get_model_info()
    assert (info["plan_digest"], info["plan_recipe"], info["plan_budget"]) == (loaded.digest(), "paper", 0.6)


def test_prompts_left_dense_score_as_the_dense_model(tiny):
    model, _, plan, tasks = tiny
    # longer than calls with masks
    pairs = [(" ".join([start] * 5), end) for start, end in requests(tasks)]
    ask = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    dense = HFLM(model, device="cpu", dtype="float32", batch_size=1).loglikelihood(ask, disable_tqdm=True)
    given = {"compile": False, "device": "cpu", "batch_size": 1}
    assert RanaLM(model, plan, prefill="dense", **given).loglikelihood(ask, disable_tqdm=True) == dense
    assert RanaLM(model, plan, **given).loglikelihood(ask, disable_tqdm=True) != dense


def test_invalid_arguments_raise(tiny, tmp_path, monkeypatch):
    model, _, plan, tasks = tiny
    with pytest.raises(PlanFileError, match="is not a readable plan"):
        RanaLM("no/such/model", tmp_path / "nothing")
    with pytest.raises(ModelError, match="no/such/model"):
        RanaLM("no/such/model", plan)
    with pytest.raises(PlanMismatch, match="bfloat16"):
        RanaLM(model, plan, dtype="bfloat16", device="cpu")
    network, tokenizer = load_model(model, device="cpu")
    with torch.no_grad():
        network.model.layers[0].self_attn.q_proj.weight.add_(1.0)
    with pytest.raises(PlanMismatch, match="other weights"):
        RanaLM(network, plan, tokenizer=tokenizer)
    for wrong in ({"prefill": "sparse"}, {"compile": "maybe"}):
        with pytest.raises(InvalidOption, match=next(iter(wrong))):
            RanaLM(model, plan, **wrong)
    with pytest.raises(InvalidOption, match="a folder"):
        run_tasks(HFLM(model, device="cpu"), TASKS, include=tmp_path / "nothing")
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    with pytest.raises(InvalidOption, match="local_chioce.* expected tasks that `lm_eval ls tasks` lists, or that .* defines"):
        run_tasks(HFLM(model, device="cpu"), ["local_text", "local_chioce"], include=tasks)


def test_command_writes_scores(tiny, tmp_path):
    model, _, plan, tasks = tiny
    words = ["tasks", model, "--plan", plan, "--tasks", ",".join(TASKS), "--include", tasks, "--limit", 3, "--no-compile"]
    result = CliRunner().invoke(app, [str(word) for word in [*words, "--device", "cpu", "--json", tmp_path / "t.json"]])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "t.json").read_text())
    assert found["digest"] == rana_fx.load_plan(plan).digest() and found["budget"] == {"asked": 0.6, "metric": "flops"}
    assert set(found["scores"]) == set(TASKS)
    assert all(name in result.output for name in TASKS)


def test_lm_evals_own_command_line_knows_the_model(tiny, tmp_path, monkeypatch, capsys):
    model, _, plan, tasks = tiny
    words = ["--model", "rana", "--model_args", f"pretrained={model},plan={plan},compile=false", "--device", "cpu"]
    words += ["--tasks", "local_choice", "--include_path", str(tasks), "--limit", "2", "--output_path", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words])
    # reading the task files of lm_eval takes longer than the rest of this file
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    lm_evals_command_line()
    assert "|local_choice|" in capsys.readouterr().out
    (written,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(written.read_text())["config"]["plan_digest"] == rana_fx.load_plan(plan).digest()


def test_the_papers_tasks_are_called_so_by_lm_eval():
    folder = Path(lm_eval.tasks.__file__).parent
    files = (file for name in ("winogrande", "piqa", "arc", "hellaswag", "race") for file in (folder / name).glob("*.yaml"))
    named = {line.removeprefix("task: ").strip() for file in files for line in file.read_text().splitlines()}
    assert len(PAPER_TASKS) == 6 and set(PAPER_TASKS) <= named
