"""Every linear of a model is found: adapted, or listed as found and skipped with the reason.

Held against PyTorch's FLOP counter: what the model computes eagerly is what its traced graphs compute, and each product there
is a linear, a skipped weight, a product of activations, or a product that reads no data. How many linears, groups, blocks and
stacks one layer has is counted on the same trace (of two layers: tests/integration/test_architectures.py).
"""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from rana_fx.calibration.batches import call
from rana_fx.calibration.calibrate import _Sampler, calibrate
from rana_fx.graph.linears import find_linears
from rana_fx.graph.normalize import prepare
from rana_fx.modules import names_of
from tests.support.adapted import EVERY
from tests.support.architectures import counts_of, make


class Counting(fx.Interpreter):
    """FLOPs of each node of a graph that runs."""

    def __init__(self, module):
        super().__init__(module)
        self.flops = {}

    def run_node(self, node):
        with FlopCounterMode(display=False) as counter:
            result = super().run_node(node)
        self.flops[node] = counter.get_total_flops()
        return result


def accounted(model, batch):
    """(FLOPs by what they are spent on, nodes that nothing lists, all that is listed, the calibration), from one trace."""
    spent, lost, names = dict.fromkeys(("linears", "skips", "activations", "constants"), 0), [], names_of(model)

    def instrument(sampler, module, inputs):
        prepare(module, inputs)
        scan = find_linears(module, inputs, names)
        listed.update({linear.name for linear in scan.linears} | {skip.site for skip in scan.skips})
        linears = {linear.node: linear for linear in scan.linears}
        counting = Counting(module)

        def run(*args):
            result = counting.run(*args)
            for node, flops in counting.flops.items():
                held = set().union(*(scan.constant.get(source, set()) for source in node.all_input_nodes))
                matrices = [scan.weights[leaf] for leaf in held if scan.weights[leaf].dim() > 1]
                if not flops:
                    continue
                if node in linears:
                    linear = linears[node]
                    tokens = node.meta["example_value"].numel() // linear.out_features
                    assert flops == 2 * tokens * linear.out_features * linear.in_features, linear.name
                    spent["linears"] += flops
                elif node in scan.products | scan.convolutions:
                    spent["skips"] += flops
                elif node in scan.constant:
                    spent["constants"] += flops
                else:
                    spent["activations"] += flops
                    lost.extend([node.name] if matrices else [])
            return result

        own(sampler, module, inputs)
        module.forward = run
        module.recompile = lambda: None

    listed, own = set(), _Sampler._instrument
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Sampler, "_instrument", instrument)
        calibrated = calibrate(model, [batch], progress=False)
    return spent, lost, listed, calibrated


def eager(model, batch):
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # the counter registers hooks for gradients
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # whose operators are not counted
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call(model, batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", EVERY)
def test_every_product_is_listed(name):
    model, batch = make(EVERY[name], 1)
    total = eager(model, batch)
    spent, lost, listed, calibrated = accounted(model, batch)
    assert not lost
    assert sum(spent.values()) == total and spent["linears"] > 0
    # not every product of a skip is counted: grouped ones of experts are not
    assert not spent["skips"] or EVERY[name].expected(1).skips
    layout = calibrated.layout
    assert listed == {*layout.sites, *(skip.site for skip in layout.skips)}
    assert counts_of(layout) == EVERY[name].expected(1)
    assert calibrated.samples == {}


def matrix(*shape):
    return nn.Parameter(torch.randn(*shape) / 3)


class Spelled(nn.Module):
    """One more product beside an MLP that every model of this file has."""

    def __init__(self, function, *shapes):
        super().__init__()
        self.up, self.down, self.function = nn.Linear(8, 16), nn.Linear(16, 8), function
        self.w = nn.ParameterList([matrix(*shape) for shape in shapes])

    def forward(self, x):
        x = x + self.down(torch.relu(self.up(x)))
        return x + self.function(x, *self.w)


BILINEAR = "a product of two activations with a weight (bilinear)"
COMPUTED = "its weight is computed in the forward pass"
LEFT = "its product with the activation is not one over the last dimension ({})"
ADAPTED = {
    "tensordot": (lambda x, w: torch.tensordot(x, w, dims=1), (8, 8)),
    "tensordot of named dimensions": (lambda x, w: torch.tensordot(x, w, dims=([-1], [1])), (8, 8)),
    "tensordot of two dimensions": (lambda x, w: torch.tensordot(x.unflatten(-1, (2, 4)), w, dims=2), (2, 4, 8)),
    "inner": (torch.inner, (8, 8)),
    "einsum without an output": (lambda x, w: torch.einsum("abi,ic", x, w), (8, 8)),
    "einsum with an ellipsis": (lambda x, w: torch.einsum("...i,oi->...o", x, w), (8, 8)),
    "einsum with spaces": (lambda x, w: torch.einsum(" b t i , o i -> b t o ", x, w), (8, 8)),
    "einsum of lists": (lambda x, w: torch.einsum(x, [0, 1, 2], w, [3, 2], [0, 1, 3]), (8, 8)),
    "einsum of lists without an output": (lambda x, w: torch.einsum(x, [0, 1, 2], w, [3, 2]), (8, 8)),
    "einsum with an ellipsis in a list": (lambda x, w: torch.einsum(x, [..., 2], w, [3, 2], [..., 3]), (8, 8)),
    "einsum, weight first": (lambda x, w: torch.einsum("oi,...i->...o", w, x), (8, 8)),
    "mv": (lambda x, w: torch.mv(w, x[0, 0]), (8, 8)),
    "matrix times vector": (lambda x, w: w @ x[0, 0], (8, 8)),
    "method mv": (lambda x, w: w.mv(x[0, 0]), (8, 8)),
}
REPORTED = {
    "linalg.multi_dot": (lambda x, a, b: torch.linalg.multi_dot([x[0], a, b]), ((8, 6), (6, 8)), LEFT.format("linalg_multi_dot")),
    "addmm by name": (
        lambda x, w: torch.addmm(mat1=x[0], mat2=w, input=x[0, 0]),
        ((8, 8),),
        "its bias is an activation or is computed",
    ),
    "einsum of three": (lambda x, a, b: torch.einsum("bti,ij,jk->btk", x, a, b), ((8, 6), (6, 8)), LEFT.format("einsum")),
    "a product of weights": (lambda x, a, b: F.linear(x, a @ b), ((8, 3), (3, 8)), COMPUTED),
    "a sum of weights": (lambda x, a: F.linear(x, a + 1), ((8, 8),), COMPUTED),
    "bilinear": (lambda x, a: F.bilinear(x, x, a), ((8, 8, 8),), BILINEAR),
    "matmul from the left": (lambda x, a: a @ x, ((3, 3),), LEFT.format("matmul")),
    "conv1d of width one": (lambda x, a: F.conv1d(x.transpose(1, 2), a).transpose(1, 2), ((8, 8, 1),), "a convolution (conv1d)"),
    "baddbmm": (lambda x, a: torch.baddbmm(x, x, a), ((2, 8, 8),), None),
    "addbmm": (lambda x, a: torch.addbmm(x[0], x, a), ((2, 8, 8),), None),
    "bmm of one matrix": (lambda x, a: torch.bmm(x, a.expand(2, 8, 8)), ((8, 8),), COMPUTED),
    "scaled addmv": (
        lambda x, a: torch.addmv(x[0, 0], a, x[0, 1], alpha=0.5),
        ((8, 8),),
        "addmv with alpha or beta other than 1",
    ),
    "a written weight": (lambda x, a: F.linear(x, a.mul_(1.0)), ((8, 8),), COMPUTED),
}


@torch.library.custom_op("rana_fx_tests::linear", mutates_args=())
def custom_linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w


@custom_linear.register_fake
def _(x, w):
    return x.new_empty(*x.shape[:-1], w.shape[1])


@torch.compiler.allow_in_graph
def matmul(x, w):
    return F.linear(x, w) * 2


OPAQUE = {
    "rana_fx_tests::linear": lambda x, w: torch.ops.rana_fx_tests.linear(x, w),
    f"{__name__}.matmul": lambda x, w: matmul(x, w),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_an_operator_that_only_has_the_name_of_a_product_is_none(name):
    layout = layout_of(Spelled(OPAQUE[name], (8, 8)), torch.randn(2, 3, 8))
    assert set(layout.sites) == {"up", "down"}
    reason = f"inside an operator whose parts are not known ({name})"
    assert [(skip.site, skip.reason) for skip in layout.skips] == [("w.0", reason)]


def layout_of(model, x):
    return calibrate(model, [x], progress=False).layout


@pytest.mark.parametrize("name", ADAPTED)
def test_products_that_are_linears(name):
    function, shape = ADAPTED[name]
    layout = layout_of(Spelled(function, shape), torch.randn(2, 3, 8))
    assert set(layout.sites) == {"up", "down", "w.0"} and not layout.skips
    assert (layout.sites["w.0"].out_features, layout.sites["w.0"].in_features) == (8, 8)


@pytest.mark.parametrize("name", REPORTED)
def test_products_that_are_none_are_reported(name):
    function, shapes, reason = REPORTED[name]
    layout = layout_of(Spelled(function, *shapes), torch.randn(2, 3, 8))
    assert set(layout.sites) == {"up", "down"}
    assert {skip.site for skip in layout.skips} == {f"w.{place}" for place in range(len(shapes))}
    assert all(reason is None or skip.reason == reason for skip in layout.skips)


def test_lazy_linears_are_found():
    model = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(8))
    assert set(layout_of(model, torch.randn(4, 8)).sites) == {"0", "2"}


def test_a_buffer_is_reported():
    class Projected(Spelled):
        def __init__(self):
            super().__init__(lambda x: F.linear(x, self.fixed))
            self.register_buffer("fixed", torch.randn(8, 8))

    skips = {skip.site: skip.reason for skip in layout_of(Projected(), torch.randn(2, 3, 8)).skips}
    assert skips == {"fixed": "its matrix is a buffer, and no Parameter"}


class Named(nn.Module):
    """A gated MLP and products with a weight and a buffer; ``parts``: gate and up of one activation."""

    def __init__(self, parts, named):
        super().__init__()
        torch.manual_seed(0)
        self.gate_up, self.down, self.w = matrix(32, 8), matrix(8, 16), matrix(8, 8)
        self.register_buffer("fixed", torch.randn(8, 8))
        self.parts, self.named = parts, named

    def forward(self, x):
        if not self.named:
            gate, up = F.linear(x, self.gate_up).chunk(2, -1)
            x = x + F.linear((F.silu(gate) * up).reshape(2, 3, 16), self.down)
            x = x + torch.matmul(x, self.w.t())
            return x + torch.matmul(x, self.fixed.t())
        gate, up = self.parts(F.linear(input=x, weight=self.gate_up))
        hidden = torch.reshape(input=torch.mul(input=F.silu(input=gate), other=up), shape=(2, 3, 16))
        x = x + F.linear(input=F.dropout(input=hidden, training=False), weight=self.down)
        x = x + torch.matmul(input=x, other=torch.transpose(input=self.w, dim0=0, dim1=1))
        return x + torch.matmul(input=x, other=torch.transpose(input=self.fixed, dim0=0, dim1=1))


PARTS = {
    "narrow": lambda h: [torch.narrow(input=h, dim=-1, start=start, length=16) for start in (0, 16)],
    "narrow, some by name": lambda h: [torch.narrow(h, -1, start=start, length=16) for start in (0, 16)],
    "method narrow": lambda h: [h.narrow(dim=-1, start=start, length=16) for start in (0, 16)],
    "chunk": lambda h: torch.chunk(input=h, chunks=2, dim=-1),
    "split": lambda h: torch.split(tensor=h, split_size_or_sections=16, dim=-1),
}


@pytest.mark.parametrize("name", PARTS)
def test_arguments_by_name_are_those_by_position(name):
    x, rows = torch.randn(2, 3, 8), torch.randn(5, 32)
    expected, found = (layout_of(Named(PARTS[name], named), x) for named in (False, True))
    assert set(found.sites) == set(expected.sites) == {"gate_up", "down", "w"}
    assert [(skip.site, skip.reason) for skip in found.skips] == [("fixed", "its matrix is a buffer, and no Parameter")]
    assert [(block.ups, block.down) for block in found.blocks] == [(block.ups, block.down) for block in expected.blocks]
    torch.testing.assert_close(found.blocks[0].pointwise(rows), expected.blocks[0].pointwise(rows), rtol=0, atol=0)


@torch.compiler.allow_in_graph
def split(tensor):
    return tensor[..., :8]


def test_a_function_that_has_the_name_of_a_split_may_have_no_arguments_by_position():
    class Projected(Spelled):
        def __init__(self):
            super().__init__(lambda x, w: F.linear(split(tensor=F.linear(x, w)), split(tensor=self.fixed)), (16, 8))
            self.register_buffer("fixed", torch.randn(8, 16))

        def forward(self, x):
            return super().forward(x) + self.down(torch.relu(split(tensor=self.up(x))).repeat(1, 1, 2))

    assert set(layout_of(Projected(), torch.randn(2, 3, 8)).sites) == {"up", "down", "w.0"}
