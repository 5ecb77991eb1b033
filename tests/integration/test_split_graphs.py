"""Graphs that are compiled in pieces with fake inputs, as DistributedDataParallel has it, and two models in one graph."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses import FakeTensorMode

import rana_fx
from rana_fx._backend import rewrite
from rana_fx.errors import PlanMismatch, RanaWarning
from rana_fx.runtime.attachment import attached
from tests.support.adapted import adapted, relative
from tests.support.architectures import output
from tests.support.by_hand import outputs_by_hand

# Dynamo skips what DistributedDataParallel logs
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def in_pieces(process_group, monkeypatch, request):
    """(a model in DistributedDataParallel with several buckets, a batch, its plan). Parameter: layers, by default two."""
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 20_000)
    model, batch, plan = adapted(depth=getattr(request, "param", 2))
    return nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.02), batch, plan


def _expected(model, batch):
    return outputs_by_hand(model, batch)[0]


@pytest.mark.parametrize("how", ["attached", "as an option"])
def test_buckets_of_distributed_data_parallel(in_pieces, how, graphs_as_rewritten):
    wrapped, batch, plan = in_pieces
    expected = _expected(wrapped.module, batch)
    options = None
    if how == "as an option":
        rana_fx.detach(wrapped.module)
        options = {"plan": plan}
    with torch.no_grad():
        fast = torch.compile(wrapped, backend=rana_fx.backend, options=options)
        assert relative(output(fast(**batch, use_cache=False)), expected) < 1e-5
        assert len(graphs_as_rewritten) > 1
        # compiled code is valid for these weights alone
        weight = wrapped.module.model.layers[0].mlp.up_proj
        weight.weight = nn.Parameter(weight.weight.detach() * 2)
        if how == "attached":
            with pytest.warns(RanaWarning, match="up_proj: the plan is not applied here"):
                assert relative(output(fast(**batch, use_cache=False)), expected) > 1e-3
        else:
            with pytest.raises(BackendCompilerFailed, match="up_proj: got digest") as caught:
                fast(**batch, use_cache=False)
            assert isinstance(caught.value.inner_exception, PlanMismatch)


@pytest.mark.parametrize("in_pieces", [1], indirect=True, ids=["one layer"])
def test_pieces_through_inductor_free_weights_at_the_first_real_run(in_pieces):
    wrapped, batch, _ = in_pieces
    expected, graphs = _expected(wrapped.module, batch), []

    def counting(gm, example_inputs):
        graphs.append(gm)
        return rana_fx.backend(gm, example_inputs, options={"prefill": "factors"})

    with torch.no_grad():
        fast = torch.compile(wrapped, backend=counting)
        for _ in range(2):
            assert relative(output(fast(**batch, use_cache=False)), expected) < 1e-5
    assert len(graphs) > 1
    assert wrapped.module.model.layers[0].mlp.up_proj.weight.isnan().all()


def test_a_fake_input_of_another_backend_is_found_by_its_mode(monkeypatch):
    """Without anything that Dynamo recorded."""
    model, batch, plan = adapted()
    expected = _expected(model, batch)
    counts: list[int] = []
    forget = False

    def faked(gm, example_inputs):
        graph = torch.fx.Graph()
        graph.output(graph.graph_copy(gm.graph, {}))
        for node in graph.find_nodes(op="placeholder"):
            node.meta.pop("grapharg", None)
        mode = FakeTensorMode()
        made = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in example_inputs]
        if forget:
            mode.fake_tensor_converter.meta_converter.describer.lookup_tensor.clear()
        bare = torch.fx.GraphModule(gm, graph)
        with monkeypatch.context() as patch:
            patch.setattr("rana_fx.graph.real_values.translator", lambda: None)
            counts.append(sum(rewrite(bare, made).replaced.values()))
        return bare.forward

    with torch.no_grad():
        fast = torch.compile(model, backend=faked)
        assert relative(output(fast(**batch)), expected) < 1e-5
    assert counts == [sum(len(adapter.sites) for adapter in plan.adapters)]
    forget = True
    torch.compiler.reset()
    with (
        torch.no_grad(),
        pytest.warns(RanaWarning, match="the graph was given a fake tensor for its weight, and the weight itself"),
    ):
        fast(**batch)
    assert counts[1] == 0


@pytest.mark.usefixtures("graphs_as_rewritten")
def test_two_models_with_one_plan_in_one_graph():
    """Each multiplies by its own factors, though they have one plan and one order of adapters."""
    student, batch, _ = adapted()
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for factor in student.rana_fx.parameters():
            factor.mul_(0.5)

    def alone(model):
        return output(torch.compile(model, backend=rana_fx.backend)(**batch))

    with torch.no_grad():
        expected = alone(student), alone(teacher)
        both = torch.compile(lambda: (output(student(**batch)), output(teacher(**batch))), backend=rana_fx.backend)()
    assert attached(student) is not attached(teacher) and relative(*expected) > 1e-2
    for got, wanted in zip(both, expected, strict=True):
        torch.testing.assert_close(got, wanted)
