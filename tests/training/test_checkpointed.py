"""Gradient checkpointing: linears in its regions are found, training is unchanged, and fewer activations are stored."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import rana_fx
from rana_fx._backend import rewrite
from rana_fx.graph.checkpoint_regions import open_checkpoints
from rana_fx.kernels.ops import masked_gemv
from rana_fx.passes.drop_recompute_tags import has_backward
from rana_fx.runtime.attachment import invalidate_guards
from rana_fx.training import add_lora, checkpoint_gradients, lora_config
from tests.support.trained import EPS, adapted, compiled, gradients, relative


def partitioned(kept, products):
    """A backend that partitions the joint graph as Inductor does, and counts saved tensors and masked matmuls."""

    def how(gm, example_inputs):
        rewrite(gm, example_inputs)
        products.append(sum(node.target is masked_gemv for node in gm.graph.nodes))

        def partition(joint, inputs, **kwargs):
            forward, backward = min_cut_rematerialization_partition(joint, inputs, **kwargs)
            kept.append(len(forward.graph.output_node().args[0]))
            return forward, backward

        nop = lambda graph, _: make_boxed_func(graph.forward)  # noqa: E731
        return aot_autograd(fw_compiler=nop, bw_compiler=nop, partition_fn=partition)(gm, example_inputs)

    return how


def test_it_trains_the_same_and_keeps_less():
    """Also with LoRA dropout: recomputation with other random numbers would give other gradients."""
    model, batch = adapted(depth=1, name="llama")
    add_lora(model, lora_config(rank=4, dropout=0.3))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(True)
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    invalidate_guards(model)
    kept, products, found = [], [], []
    model.train()
    for switch in (lambda _: None, checkpoint_gradients):
        switch(model)
        torch.manual_seed(3)
        found.append(gradients(model, compiled(model, partitioned(kept, products)), batch))
    (loss, expected), (other, got) = found
    assert products[0] == products[1] > 0  # every linear of a region was found
    assert abs(other - loss) < 1e-6 * abs(loss) and got.keys() == expected.keys()
    assert "rana_fx.a0_router" in got and sum("lora_" in name for name in got) > 8
    for name, grad in got.items():
        assert relative(grad, expected[name]) < 1e4 * EPS, name
    # per layer only its input, as with PyTorch's checkpoints of the dense model
    assert kept[1] < kept[0]


def policy():
    return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE)


class Regions(nn.Module):
    """Nested regions, a region with two results, one without users, one with its own policy."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def inner(self, x):
        return torch.relu(self.a(x))

    def outer(self, x):
        y = checkpoint(self.inner, x, use_reentrant=False)
        return self.b(y), y * 2

    def forward(self, x):
        first, second = checkpoint(self.outer, x, use_reentrant=False)
        third = checkpoint(self.inner, first, use_reentrant=False, context_fn=policy)
        return third + second


def test_regions_are_opened_in_order_and_compute_the_same():
    model, x = Regions(), torch.randn(3, 8, requires_grad=True)
    expected = model(x)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    opened, graphs = [], []

    def how(gm, _):
        opened.append(open_checkpoints(gm))
        graphs.append(gm)
        return gm.forward

    got = compiled(model, how)(x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), x)[0], wanted)
    assert opened == [3]
    linears = [node for node in graphs[0].graph.nodes if "linear" in str(node.target)]
    assert len(linears) == 3 and all(node.meta["recompute"] == CheckpointPolicy.PREFER_RECOMPUTE for node in linears)
    # a, b, a: the inner region between the operations of the outer one; numbers of regions increase
    regions = [node.meta["ac_graph_id"] for node in linears]
    assert len(set(regions)) == 3 and max(regions) == regions[2]
    assert open_checkpoints(graphs[0]) == 0  # no region is left


def inferred(graphs):
    """A backend that traces past autograd as Inductor does, with or without a backward pass, and runs what it gets."""

    def how(gm, example_inputs):
        rewrite(gm, example_inputs)
        graphs.append(sum("recompute" in node.meta for node in gm.graph.nodes))
        nop = lambda graph, _: make_boxed_func(graph.forward)  # noqa: E731
        return aot_autograd(fw_compiler=nop, bw_compiler=nop, inference_compiler=nop)(gm, example_inputs)

    return how


@pytest.mark.parametrize("frozen", [False, True], ids=["no_grad", "frozen"])
def test_it_runs_without_gradients(frozen):
    """PyTorch takes attention to draw random numbers: tagged to be recomputed, it is refused where there is no backward."""
    model, batch = adapted(depth=1, name="llama")
    model.train()
    found, tagged = [], []
    for parameter in model.parameters():
        parameter.requires_grad_(not frozen)
    invalidate_guards(model)
    for switch in (lambda _: None, checkpoint_gradients):
        switch(model)
        with torch.set_grad_enabled(frozen):
            found.append(compiled(model, inferred(tagged))(**batch, use_cache=False).logits)
    assert tagged == [0, 0]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_tags_stay_where_factors_alone_are_trained():
    """No input and no weight of the model's requires a gradient then."""
    model, batch = adapted(depth=1, name="llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("rana_fx" in name)
    invalidate_guards(model)
    checkpoint_gradients(model)
    model.train()
    tagged = []
    loss = compiled(model, inferred(tagged))(**batch, use_cache=False).logits.sum()
    assert loss.requires_grad and tagged[0] > 0


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, w: x @ w, True),
        (lambda x, w: (x @ w).detach(), False),
        (lambda x, w: (x @ w).argmax(-1), False),
        (lambda x, w: x.add_((x @ w).sum()), True),
        (lambda x, w: (x @ w.detach(), x.clone().mul_(2)), False),
    ],
)
def test_whether_there_is_a_backward_pass(function, expected):
    found = []

    def look(gm, example_inputs):
        found.append(has_backward(gm, example_inputs))
        return gm.forward

    weight = nn.Parameter(torch.ones(4, 4))
    torch._dynamo.reset()
    torch.compile(function, backend=look)(torch.ones(2, 4), weight)
    with torch.no_grad():
        torch.compile(function, backend=look)(torch.ones(2, 4), weight)
    assert found == [expected, False]


def test_dropout_of_nothing_in_a_region():
    """With p = 0 it is its input or a copy, by where it was traced; as in models whose config has attention_dropout = 0.0."""
    torch.manual_seed(0)

    class Region(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

        def inner(self, x):
            return self.down(nn.functional.dropout(torch.relu(self.up(x)), 0.0, True))

        def forward(self, x):
            return x + torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    model, x = Region().train(), torch.randn(3, 5, 8)
    rana_fx.adapt(model, [torch.randn(4, 16, 8) for _ in range(4)], budget=0.8, recipe="teal", progress=False)
    with torch.no_grad():
        got = compiled(model)(x)
        torch.testing.assert_close(got, compiled(model.eval())(x))
    assert (got - model(x)).abs().max() > 1e-3
