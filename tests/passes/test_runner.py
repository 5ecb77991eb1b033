"""The order of all passes, and the work of the runner for each: results, times, dumps, verification, dead code."""

from __future__ import annotations

import re
import time

import pytest
import torch
from torch.nn import functional as F

import rana_fx
from rana_fx.kernels.ops import masked_gemv
from rana_fx.passes import NORMALIZE, POST_GRAD, PRE_GRAD
from rana_fx.passes.base import Declined, PassResult, PostGrad
from rana_fx.passes.runner import Runner, run
from tests.support.exact import FORMS, batch_of, mlp
from tests.support.graphs import mask, traced

_aten = torch.ops.aten


def names(passes):
    return [step.__name__ for step in passes]


def test_order():
    assert names(NORMALIZE) == [
        "order_arguments",
        "inline_checkpoint_regions",
        "inline_regions",
        "separate_results",
        "redirect_reads",
        "decompose_fused",
    ]
    assert names(PRE_GRAD) == [
        "check_foreign_lora",
        "rewrite_gated",
        "rewrite_adapter",
        "check_rewritten",
        "rewrite_lora",
        "rewrite_attention",
        "decompose_transformed",
        "drop_recompute_tags",
        "check_freed",
    ]
    assert names(POST_GRAD) == [
        "fuse_norm",
        "fuse_residual",
        "fuse_gated",
        "fuse_same_input",
        "fuse_product_norm",
        "fuse_repeated_heads",
    ]


def drop_double_negation(graph_module, context):
    """An example of a pass from outside of the package: -(-x) becomes x."""
    count, declined = 0, []
    for node in graph_module.graph.find_nodes(op="call_function", target=_aten.neg.default):
        (inner,) = node.args
        if inner.target is not _aten.neg.default:
            declined.append(Declined(node.name, f"it negates {inner.name}, on {context.devices}"))
            continue
        node.replace_all_uses_with(inner.args[0])
        count += 1
    return PassResult(count, tuple(declined))


def sums():
    """(graph, inputs): a residual that is negated twice, and a masked matmul."""
    inputs = torch.randn(1, 8), torch.randn(1, 6), mask(6), torch.randn(6, 8)
    return traced(lambda r, *operands: torch.neg(torch.neg(r)) + masked_gemv(*operands), *inputs), inputs


def test_a_pass_from_outside_runs_with_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("RANA_FX_DUMP", str(tmp_path / "made"))
    module, inputs = sums()
    expected = module(*inputs)
    runner = Runner()
    runner.run((*POST_GRAD, drop_double_negation), module, PostGrad(("cpu",)), past_autograd=True)
    assert names_and_counts(runner) == [
        ("fuse_norm", 0),
        ("fuse_residual", 1),
        ("fuse_gated", 0),
        ("fuse_same_input", 0),
        ("fuse_product_norm", 0),
        ("fuse_repeated_heads", 0),
        ("drop_double_negation", 1),
    ]
    # dead code is removed, and the module is recompiled from the graph
    assert [node.target for node in module.graph.nodes if node.op == "call_function"] == [torch.ops.rana.masked_gemv_add.default]
    torch.testing.assert_close(module(*inputs), expected)
    assert runner.declined()[-1] == ("drop_double_negation", Declined("neg", "it negates arg0_1, on ('cpu',)"))
    # only passes that changed the graph are written, each with the graph before and after it
    stem = f"{runner.graph:02}"
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        f"{stem}.01.fuse_residual.after.py",
        f"{stem}.01.fuse_residual.before.py",
        f"{stem}.06.drop_double_negation.after.py",
        f"{stem}.06.drop_double_negation.before.py",
        f"{stem}.report.txt",
    ]
    texts = {path.name.removeprefix(f"{stem}."): path.read_text() for path in (tmp_path / "made").iterdir()}
    assert "masked_gemv_add" not in texts["01.fuse_residual.before.py"]
    assert texts["01.fuse_residual.after.py"] == texts["06.drop_double_negation.before.py"]
    assert "masked_gemv_add" in texts["01.fuse_residual.after.py"]
    assert "neg" not in texts["06.drop_double_negation.after.py"]
    assert re.search(r"fuse_residual +1 changed +[\d.]+ ms, verified in [\d.]+ ms\n", texts["report.txt"])
    assert "    neg: it negates arg0_1, on ('cpu',)\n" in texts["report.txt"]


def names_and_counts(runner):
    return [(record.name, record.result.count) for record in runner.records]


def test_nothing_is_written_without_being_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("RANA_FX_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    module, _ = sums()
    Runner().run(POST_GRAD, module, PostGrad(("cpu",)), past_autograd=True)
    assert not list(tmp_path.iterdir())


def test_times_are_of_the_pass():
    def slow(graph_module, context):
        time.sleep(0.05)
        return PassResult()

    runner = Runner()
    runner.run((slow, drop_double_negation), sums()[0], PostGrad())
    assert runner.records[0].seconds >= 0.05 > runner.records[1].seconds
    assert all(record.verify_seconds > 0 for record in runner.records)


def test_a_pass_that_breaks_a_graph_is_named(tmp_path, monkeypatch):
    def widen(graph_module, context):
        for node in graph_module.graph.find_nodes(op="call_function", target=_aten.add.Tensor):
            node.meta["val"] = node.meta["val"].double()
        return PassResult(1)

    def misplace(graph_module, context):
        (node,) = graph_module.graph.find_nodes(op="call_function", target=_aten.add.Tensor)
        next(iter(graph_module.graph.nodes)).prepend(node)
        return PassResult(1)

    monkeypatch.setenv("RANA_FX_DUMP", str(tmp_path))
    for wrong, message in (
        (widen, "torch.float64 on cpu, and yields torch.float32"),
        (misplace, "used before it has been defined"),
    ):
        with pytest.raises(AssertionError, match=rf"after {wrong.__name__}: (.|\n)*{message}"):
            Runner().run((*POST_GRAD, wrong), sums()[0], PostGrad(()), past_autograd=True)
        # the invalid graph is dumped
        assert len(list(tmp_path.glob(f"*.06.{wrong.__name__}.after.py"))) == 1


def test_dead_code_stays_before_autograd():
    """A Dynamo graph has in-place writes, which the users of nodes do not show."""

    def orphan(graph_module, context):
        (node,) = graph_module.graph.find_nodes(op="call_function", target=_aten.add.Tensor)
        node.replace_all_uses_with(node.args[1])
        return PassResult(1)

    for past_autograd in (False, True):
        module, _ = sums()
        Runner().run((orphan,), module, PostGrad(), past_autograd=past_autograd)
        assert bool(module.graph.find_nodes(op="call_function", target=_aten.add.Tensor)) is not past_autograd


def results(model, batch, **options):
    found = []

    def backend(gm, example_inputs):
        found.append(run(gm, example_inputs, **options))
        return gm.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(**batch)
    return found


def test_results_of_a_rewrite():
    model, plan = mlp(FORMS["linear"], F.gelu)
    rana_fx.detach(model)
    rana_fx.attach(model, plan)
    (result,) = results(model, batch_of())
    assert [record.name for record in result.runner.records] == names([*NORMALIZE, *PRE_GRAD])
    kinds = {adapter.kind: len(adapter.sites) for adapter in plan.adapters}
    assert result.replaced == {"rewrite_gated": 0, "rewrite_adapter": kinds["rank"] + kinds.get("neuron", 0)}
    assert result.declined == ()


@pytest.mark.parametrize("mode", ["dense", "cheapest"])
def test_linears_that_stay_as_they_are_have_a_reason(mode):
    model, plan = mlp(FORMS["linear"], F.gelu)
    rana_fx.detach(model)
    rana_fx.attach(model, plan)
    (result,) = results(model, batch_of(tokens=200), prefill=mode)
    declined = dict(found for name, found in result.declined if name == "match")
    planned = {site for adapter in plan.adapters for site in adapter.sites}
    assert declined.keys() | {linear.name for match in result.matches.found for linear in match.linears} == planned
    assert declined and all(reason.startswith(f"prefill={mode}, ") for reason in declined.values())
    assert sum(result.replaced.values()) == len(planned) - len(declined)
